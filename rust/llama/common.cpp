// llama.cpp's knowledge of chat formats (common/chat.h) behind a C interface: JSON in, JSON out.
// Its headers are no published interface of the bindings; this file is compiled against the sources they were built from.
// As in shim.cpp no exception leaves: a failure is INT32_MIN with a message.

#include <chat-peg-parser.h>
#include <chat.h>
#include <log.h>

#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>

struct llamactor_formats {
    common_chat_templates_ptr templates;
};

struct llamactor_reader {
    common_peg_arena   parser;
    common_chat_format format;
    std::string        prefix;
};

namespace {

template <typename Call>
int32_t guarded(char * message, size_t size, Call && call) noexcept {
    try {
        call();
        return 0;
    } catch (const std::exception & error) {
        snprintf(message, size, "%s", error.what());
    } catch (...) {
        snprintf(message, size, "unknown C++ exception");
    }
    return INT32_MIN;
}

// Nothing is printed, and no thread for printing is started.
void be_quiet() {
    static std::once_flag once;
    std::call_once(once, [] { common_log_set_verbosity_thold(-1); });
}

// A copy for the other side, which gives it back with llamactor_formats_free_text.
void give(const std::string & text, char ** out, size_t * length) {
    char * copy = static_cast<char *>(malloc(text.size() + 1));
    if (copy == nullptr) {
        throw std::bad_alloc();
    }
    memcpy(copy, text.c_str(), text.size() + 1);
    *out    = copy;
    *length = text.size();
}

common_json parse(const char * text, size_t length) {
    return common_json::parse(std::string(text, length));
}

common_chat_templates_inputs inputs_of(const common_json & request) {
    common_chat_templates_inputs inputs;
    inputs.messages              = common_chat_msgs_parse_oaicompat(request.at("messages"));
    inputs.tools                 = common_chat_tools_parse_oaicompat(request.at("tools"));
    inputs.tool_choice           = common_chat_tool_choice_parse_oaicompat(request.at("tool_choice").get<std::string>());
    inputs.parallel_tool_calls   = request.at("parallel_tool_calls").get<bool>();
    inputs.add_generation_prompt = request.at("add_generation_prompt").get<bool>();
    inputs.enable_thinking       = request.at("enable_thinking").get<bool>();
    inputs.json_schema           = request.at("json_schema").get<std::string>();
    inputs.reasoning_format      = request.at("reads_reasoning").get<bool>() ? COMMON_REASONING_FORMAT_DEEPSEEK
                                                                             : COMMON_REASONING_FORMAT_NONE;
    for (const auto & [name, value] : request.at("kwargs").items()) {
        inputs.chat_template_kwargs[name] = value.dump();
    }
    return inputs;
}

const char * kind_of(common_grammar_trigger_type type) {
    switch (type) {
        case COMMON_GRAMMAR_TRIGGER_TYPE_TOKEN:   return "token";
        case COMMON_GRAMMAR_TRIGGER_TYPE_WORD:    return "word";
        case COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN: return "pattern";
        default:                                  return "pattern_full";
    }
}

common_json json_of(const common_chat_params & params) {
    common_json triggers = common_json::array();
    for (const auto & trigger : params.grammar_triggers) {
        triggers.push_back({{"kind", kind_of(trigger.type)}, {"value", trigger.value}});
    }
    common_json json = common_json::object();
    json["format"]             = common_chat_format_name(params.format);
    json["format_id"]          = static_cast<int>(params.format);
    json["prompt"]             = params.prompt;
    json["generation_prompt"]  = params.generation_prompt;
    json["grammar"]            = params.grammar;
    json["grammar_lazy"]       = params.grammar_lazy;
    json["triggers"]           = triggers;
    json["preserved_tokens"]   = params.preserved_tokens;
    json["stops"]              = params.additional_stops;
    json["parser"]             = params.parser;
    json["supports_thinking"]  = params.supports_thinking;
    json["thinking_start_tag"] = params.thinking_start_tag;
    json["thinking_end_tags"]  = params.thinking_end_tags;
    return json;
}

common_chat_format format_of(const common_json & request) {
    const int format = request.at("format_id").get<int>();
    if (format < 0 || format >= COMMON_CHAT_FORMAT_COUNT) {
        throw std::invalid_argument("there is no such chat format");
    }
    return static_cast<common_chat_format>(format);
}

common_chat_parser_params parser_of(const common_json & request) {
    common_chat_parser_params params;
    params.format            = format_of(request);
    params.reasoning_format  = COMMON_REASONING_FORMAT_DEEPSEEK;
    params.generation_prompt = request.at("generation_prompt").get<std::string>();
    params.parse_tool_calls  = request.at("parse_tool_calls").get<bool>();
    const auto parser        = request.at("parser").get<std::string>();
    if (!parser.empty()) {
        params.parser.load(parser);
    }
    return params;
}

// Counts the calls that are whole: what a tag or a rule of a call encloses has come to its end.
struct whole_calls {
    const common_peg_ast_arena & ast;
    int begun = 0;
    int whole = 0;

    void visit(common_peg_ast_id id) {
        const auto & node   = ast.get(id);
        const int    before = begun;
        begun += node.tag == common_chat_peg_builder::TOOL_OPEN;
        for (const auto child : node.children) {
            visit(child);
        }
        const bool encloses = node.tag == common_chat_peg_builder::TOOL || node.rule.rfind("tool-", 0) == 0;
        const bool ends     = node.tag == common_chat_peg_builder::TOOL_CLOSE || (encloses && begun > before);
        if (ends && !node.is_partial) {
            whole = begun;
        }
    }
};

std::unique_ptr<common_chat_peg_mapper> mapper_of(common_chat_format format, common_chat_msg & message) {
    switch (format) {
        case COMMON_CHAT_FORMAT_PEG_GEMMA4:     return std::make_unique<common_chat_peg_gemma4_mapper>(message);
        case COMMON_CHAT_FORMAT_PEG_MINIMAX_M3: return std::make_unique<common_chat_peg_minimax_m3_mapper>(message);
        default:                                return std::make_unique<common_chat_peg_mapper>(message);
    }
}

// What common_chat_peg_parse makes of a text, and besides how far it came and how many calls are whole.
common_json reading_of(const llamactor_reader & reader, const std::string & text) {
    common_peg_parse_context context(reader.prefix + text, COMMON_PEG_PARSE_FLAG_LENIENT);
    const auto parsed = reader.parser.parse(context);
    common_json json  = common_json::object();
    json["state"]     = common_peg_parse_result_type_name(parsed.type);
    json["end"]       = parsed.end < reader.prefix.size() ? 0 : parsed.end - reader.prefix.size();
    json["calls"]     = common_json::array();
    if (!parsed.fail()) {
        common_chat_msg message;
        mapper_of(reader.format, message)->from_ast(context.ast, parsed);
        for (const auto & call : message.tool_calls) {
            json["calls"].push_back({{"id", call.id}, {"name", call.name}, {"arguments", call.arguments}});
        }
        whole_calls count{context.ast};
        for (const auto node : parsed.nodes) {
            count.visit(node);
        }
        json["whole"] = count.whole;
    }
    return json;
}

} // namespace

extern "C" {

int32_t llamactor_formats_init(const char * source, size_t length, const char * bos, const char * eos,
                               llamactor_formats ** out, char * message, size_t size) {
    return guarded(message, size, [&] {
        be_quiet();
        const std::string text(source, length);
        if (text.empty()) {
            throw std::invalid_argument("the template is empty");
        }
        *out = new llamactor_formats{common_chat_templates_init(nullptr, text, bos, eos)};
    });
}

void llamactor_formats_free(llamactor_formats * formats) {
    delete formats;
}

int32_t llamactor_formats_apply(const llamactor_formats * formats, const char * request, size_t request_length,
                                char ** out, size_t * length, char * message, size_t size) {
    return guarded(message, size, [&] {
        const auto params = common_chat_templates_apply(formats->templates.get(), inputs_of(parse(request, request_length)));
        give(json_of(params).dump_safe(), out, length);
    });
}

int32_t llamactor_formats_parse(const char * request, size_t request_length, char ** out, size_t * length,
                                char * message, size_t size) {
    return guarded(message, size, [&] {
        be_quiet();
        const auto json  = parse(request, request_length);
        const auto found = common_chat_parse(json.at("text").get<std::string>(), json.at("is_partial").get<bool>(),
                                             parser_of(json));
        give(found.to_json_oaicompat().dump_safe(), out, length);
    });
}

int32_t llamactor_reader_init(const char * request, size_t request_length, llamactor_reader ** out, char * message,
                              size_t size) {
    return guarded(message, size, [&] {
        be_quiet();
        const auto json   = parse(request, request_length);
        auto       reader = std::make_unique<llamactor_reader>();
        reader->format    = format_of(json);
        reader->prefix    = json.at("prefix").get<std::string>();
        reader->parser.load(json.at("parser").get<std::string>());
        *out = reader.release();
    });
}

void llamactor_reader_free(llamactor_reader * reader) {
    delete reader;
}

int32_t llamactor_reader_read(const llamactor_reader * reader, const char * text, size_t text_length, char ** out,
                              size_t * length, char * message, size_t size) {
    return guarded(message, size,
                   [&] { give(reading_of(*reader, std::string(text, text_length)).dump_safe(), out, length); });
}

void llamactor_formats_free_text(char * text) {
    free(text);
}

} // extern "C"
