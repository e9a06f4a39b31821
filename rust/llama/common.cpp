// llama.cpp's knowledge of chat formats (common/chat.h) behind a C interface: JSON in, JSON out.
// Its headers are no published interface of the bindings; this file is compiled against the sources they were built from.
// As in shim.cpp no exception leaves: a failure is INT32_MIN with a message.

#include <chat.h>
#include <log.h>

#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>

struct llamactor_formats {
    common_chat_templates_ptr templates;
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
    inputs.reasoning_format      = COMMON_REASONING_FORMAT_DEEPSEEK;
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

common_chat_parser_params parser_of(const common_json & request) {
    common_chat_parser_params params;
    const int format = request.at("format_id").get<int>();
    if (format < 0 || format >= COMMON_CHAT_FORMAT_COUNT) {
        throw std::invalid_argument("there is no such chat format");
    }
    params.format            = static_cast<common_chat_format>(format);
    params.reasoning_format  = COMMON_REASONING_FORMAT_DEEPSEEK;
    params.generation_prompt = request.at("generation_prompt").get<std::string>();
    params.parse_tool_calls  = request.at("parse_tool_calls").get<bool>();
    const auto parser        = request.at("parser").get<std::string>();
    if (!parser.empty()) {
        params.parser.load(parser);
    }
    return params;
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

void llamactor_formats_free_text(char * text) {
    free(text);
}

} // extern "C"
