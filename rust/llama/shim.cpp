// Keeps C++ exceptions on this side: an exception that crosses into Rust aborts the process.
// Every function returns what llama.cpp returned, or INT32_MIN with the exception's message in `message`.

#include <llama.h>

#include <llama-ext.h>

#include <algorithm>
#include <climits>
#include <cstdio>
#include <cstring>
#include <exception>
#include <vector>

namespace {

template <typename Call>
int32_t guarded(char * message, size_t size, Call && call) noexcept {
    try {
        return call();
    } catch (const std::exception & error) {
        snprintf(message, size, "%s", error.what());
    } catch (...) {
        snprintf(message, size, "unknown C++ exception");
    }
    return INT32_MIN;
}

} // namespace

extern "C" {

int32_t llamactor_decode(llama_context * ctx, const llama_batch * batch, char * message, size_t size) {
    return guarded(message, size, [&] {
        const int32_t code = llama_decode(ctx, *batch);
        // The rows are read right after: an error while computing must surface here.
        llama_synchronize(ctx);
        return code;
    });
}

int32_t llamactor_tokenize(const llama_vocab * vocab, const char * text, int32_t length, llama_token * tokens,
                           int32_t capacity, bool add_special, bool parse_special, char * message, size_t size) {
    return guarded(message, size, [&] {
        return llama_tokenize(vocab, text, length, tokens, capacity, add_special, parse_special);
    });
}

// Writes the special tokens in the order in which llama.cpp looks for them, and returns how many there are. It sorts
// them by length with `std::sort`, which leaves those of one length in an order that only the same call on the same
// list gives again.
int32_t llamactor_special_tokens(const llama_vocab * vocab, llama_token * tokens, int32_t capacity) {
    const int32_t attributes =
        LLAMA_TOKEN_ATTR_CONTROL | LLAMA_TOKEN_ATTR_USER_DEFINED | LLAMA_TOKEN_ATTR_UNKNOWN;
    const int32_t vocabulary = std::min(capacity, llama_vocab_n_tokens(vocab));
    std::vector<size_t> lengths(vocabulary);
    std::vector<llama_token> found;
    for (llama_token token = 0; token < vocabulary; ++token) {
        lengths[token] = strlen(llama_vocab_get_text(vocab, token));
        if (llama_vocab_get_attr(vocab, token) & attributes) {
            found.push_back(token);
        }
    }
    std::sort(found.begin(), found.end(), [&](const llama_token a, const llama_token b) {
        return lengths[a] > lengths[b];
    });
    std::copy(found.begin(), found.end(), tokens);
    return static_cast<int32_t>(found.size());
}

int32_t llamactor_token_to_piece(const llama_vocab * vocab, llama_token token, char * piece, int32_t capacity,
                                 bool special, char * message, size_t size) {
    return guarded(message, size, [&] { return llama_token_to_piece(vocab, token, piece, capacity, 0, special); });
}

int32_t llamactor_detokenize(const llama_vocab * vocab, const llama_token * tokens, int32_t count, char * text,
                             int32_t capacity, bool special, char * message, size_t size) {
    return guarded(message, size,
                   [&] { return llama_detokenize(vocab, tokens, count, text, capacity, false, special); });
}

// The row of output `index` of the last decode, or NULL.
int32_t llamactor_logits(llama_context * ctx, int32_t index, float ** row, char * message, size_t size) {
    return guarded(message, size, [&] {
        *row = llama_get_logits_ith(ctx, index);
        return 0;
    });
}

int32_t llamactor_set_adapters(llama_context * ctx, llama_adapter_lora ** adapters, size_t count, float * scales,
                               char * message, size_t size) {
    return guarded(message, size, [&] { return llama_set_adapters_lora(ctx, adapters, count, scales); });
}

// What one kind of buffer holds, in bytes.
struct llamactor_usage {
    char device[64];
    char buffer[64];
    bool host;
    uint64_t weights;
    uint64_t cache;
    uint64_t compute;
};

// Writes what the buffers of a context and its model take, and returns how many kinds of them there are.
int32_t llamactor_footprint(const llama_context * ctx, llamactor_usage * usages, int32_t capacity, char * message,
                            size_t size) {
    return guarded(message, size, [&] {
        int32_t count = 0;
        for (const auto & [type, bytes] : llama_get_memory_breakdown(ctx)) {
            if (count == capacity) {
                break;
            }
            llamactor_usage & usage = usages[count++];
            const ggml_backend_dev_t device = ggml_backend_buft_get_device(type);
            snprintf(usage.device, sizeof(usage.device), "%s", device ? ggml_backend_dev_name(device) : "");
            snprintf(usage.buffer, sizeof(usage.buffer), "%s", ggml_backend_buft_name(type));
            usage.host = ggml_backend_buft_is_host(type);
            usage.weights = bytes.model;
            usage.cache = bytes.context;
            usage.compute = bytes.compute;
        }
        return count;
    });
}

} // extern "C"

// Samplers.

extern "C" {

int32_t llamactor_sampler_apply(llama_sampler * sampler, llama_token_data_array * candidates, char * message,
                                size_t size) {
    return guarded(message, size, [&] {
        llama_sampler_apply(sampler, candidates);
        return 0;
    });
}

int32_t llamactor_sampler_accept(llama_sampler * sampler, llama_token token, char * message, size_t size) {
    return guarded(message, size, [&] {
        llama_sampler_accept(sampler, token);
        return 0;
    });
}

// DRY alone among the samplers tokenises while it is built: breakers cut inside a character may throw.
int32_t llamactor_sampler_init_dry(llama_sampler ** sampler, const llama_vocab * vocab, float multiplier, float base,
                                   int32_t allowed_length, int32_t last_tokens, const char ** breakers,
                                   size_t n_breakers, char * message, size_t size) {
    return guarded(message, size, [&] {
        *sampler = llama_sampler_init_dry(vocab, multiplier, base, allowed_length, last_tokens, breakers, n_breakers);
        return 0;
    });
}

} // extern "C"
