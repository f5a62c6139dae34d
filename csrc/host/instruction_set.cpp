// Choice of the instruction set whose CPU kernels run: by default the one that PyTorch uses.
#include "host/instruction_set.h"

#include <ATen/Version.h>
#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#include <atomic>
#include <map>

namespace mvsplit {

namespace DEFAULT {
const Kernels& kernels();
}
#ifdef MVSPLIT_X86
namespace AVX2 {
const Kernels& kernels();
}
namespace AVX512 {
const Kernels& kernels();
}
namespace AVX512_BF16 {
const Kernels& kernels();
}
#endif

namespace {

// Return the kernels that were compiled in and that this processor runs, by instruction set.
std::map<std::string, const Kernels*> available_kernels() {
    std::map<std::string, const Kernels*> available{{"DEFAULT", &DEFAULT::kernels()}};
#ifdef MVSPLIT_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2) available["AVX2"] = &AVX2::kernels();
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq");
    if (avx512) available["AVX512"] = &AVX512::kernels();
    if (avx512 && __builtin_cpu_supports("avx512bf16"))
        available["AVX512_BF16"] = &AVX512_BF16::kernels();
#endif
    return available;
}

// Return PyTorch's own choice if it was compiled in, else the baseline. PyTorch may avoid AVX-512
// on a processor that has it.
const Kernels* preferred_kernels() {
    const auto available = available_kernels();
    const std::string torch_capability = at::get_cpu_capability();
    for (const auto& name : {torch_capability + "_BF16", torch_capability})
        if (available.count(name)) return available.at(name);
    return available.at("DEFAULT");
}

std::atomic<const Kernels*>& current_kernels() {
    static std::atomic<const Kernels*> current{preferred_kernels()};
    return current;
}

}  // namespace

const Kernels& kernels() { return *current_kernels().load(); }

std::vector<std::string> capabilities() {
    std::vector<std::string> names;
    for (const auto& [name, table] : available_kernels()) names.push_back(name);
    return names;
}

std::string capability() {
    for (const auto& [name, table] : available_kernels())
        if (table == current_kernels().load()) return name;
    TORCH_INTERNAL_ASSERT(false);
}

void set_capability(const std::string& name) {
    const auto available = available_kernels();
    TORCH_CHECK_VALUE(available.count(name), "mvsplit_ops: instruction set must be one of ",
                      c10::Join(", ", capabilities()), " on this processor, got '", name, "'");
    current_kernels() = available.at(name);
}

}  // namespace mvsplit
