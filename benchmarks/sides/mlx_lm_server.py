"""`mlx_lm.server` on the BLAS that the sidecar uses. The first line on stdout says what that gives.

python mlx_lm_server.py ARGUMENTS_OF_MLX_LM_SERVER
"""

import http.server
import os
from typing import Any, cast

from child import matrix_products, say
from rounds import Ready

from mlx_sidecar.native.blas import Blas

if __name__ == "__main__":
    shim = Blas()
    shim.activate()
    from mlx_lm import server

    # Its own five make it reset the connections of many clients that come at once.
    http.server.ThreadingHTTPServer.request_queue_size = 512
    rate, threads = matrix_products(shim)
    say(Ready(os.getpid(), gflops=rate, blas_threads=threads))
    cast(Any, server).main()
