#include "mlx_sidecar/blas.hpp"

#include <dlfcn.h>

#include <atomic>
#include <cstdint>
#include <string>

namespace {

// CBLAS enumerations are ints, and the 32-bit-integer interface is the one MLX was built against.
using Blasint = std::int32_t;
using Sgemm = void (*)(int, int, int, Blasint, Blasint, Blasint, float, const float*, Blasint, const float*,
                       Blasint, float, float*, Blasint);
using Dgemm = void (*)(int, int, int, Blasint, Blasint, Blasint, double, const double*, Blasint,
                       const double*, Blasint, double, double*, Blasint);
using Cgemm = void (*)(int, int, int, Blasint, Blasint, Blasint, const void*, const void*, Blasint,
                       const void*, Blasint, const void*, void*, Blasint);

Sgemm sgemm = nullptr;
Dgemm dgemm = nullptr;
Cgemm cgemm = nullptr;
std::atomic<unsigned long long> calls{0};
std::string error;

template <typename Function>
bool find(void* library, const std::string& name, Function& function) {
  function = reinterpret_cast<Function>(::dlsym(library, name.c_str()));
  if (function == nullptr) error = "the library does not define " + name;
  return function != nullptr;
}

void count() { calls.fetch_add(1, std::memory_order_relaxed); }

}  // namespace

extern "C" {

int mlx_sidecar_blas_bind(const char* path, const char* prefix) {
  void* library = ::dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    error = ::dlerror();
    return 1;
  }
  const std::string start = std::string(prefix) + "cblas_";
  const bool found = find(library, start + "sgemm", sgemm) && find(library, start + "dgemm", dgemm) &&
                     find(library, start + "cgemm", cgemm);
  return found ? 0 : 1;
}

const char* mlx_sidecar_blas_error() { return error.c_str(); }

unsigned long long mlx_sidecar_blas_calls() { return calls.load(std::memory_order_relaxed); }

void cblas_sgemm(int order, int trans_a, int trans_b, Blasint m, Blasint n, Blasint k, float alpha,
                 const float* a, Blasint lda, const float* b, Blasint ldb, float beta, float* c,
                 Blasint ldc) {
  count();
  sgemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

void cblas_dgemm(int order, int trans_a, int trans_b, Blasint m, Blasint n, Blasint k, double alpha,
                 const double* a, Blasint lda, const double* b, Blasint ldb, double beta, double* c,
                 Blasint ldc) {
  count();
  dgemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

void cblas_cgemm(int order, int trans_a, int trans_b, Blasint m, Blasint n, Blasint k, const void* alpha,
                 const void* a, Blasint lda, const void* b, Blasint ldb, const void* beta, void* c,
                 Blasint ldc) {
  count();
  cgemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
}
