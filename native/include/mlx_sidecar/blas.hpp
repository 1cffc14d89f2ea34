// The CBLAS names that MLX's Linux CPU build imports, forwarded to a faster library.
//
// This is a plain shared library, not a Python module. Loaded with RTLD_GLOBAL before MLX, its definitions
// stand in front of the reference BLAS that MLX links: the dynamic linker binds MLX's calls to the first
// definition in the global scope. Until mlx_sidecar_blas_bind succeeds nothing may call the cblas names, so
// the Python face binds first and imports MLX after.
#pragma once

extern "C" {

// Open the library at `path`, whose CBLAS names carry `prefix`. Returns 0, or 1 and leaves the reason in
// mlx_sidecar_blas_error().
int mlx_sidecar_blas_bind(const char* path, const char* prefix);

const char* mlx_sidecar_blas_error();

// Matrix products forwarded since the library was loaded.
unsigned long long mlx_sidecar_blas_calls();
}
