import { once } from "node:events";
import { mkdtempSync, rmSync } from "node:fs";
import { connect, createServer, type Server, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";

import { SidecarExitedError, SidecarStartError, startError } from "./errors.js";
import { atHostExit } from "./host-exit.js";
import { SidecarProcess, type ProcessOptions } from "./process.js";
import { closed, PATIENCE_MS, within, type Transport } from "./transport.js";

/** A connection to a sidecar that somebody else started and that listens. */
export class SidecarSocket implements Transport {
  readonly input: Socket;
  readonly output: Socket;
  readonly pid = undefined;
  readonly gone: Promise<SidecarExitedError>;

  private constructor(socket: Socket) {
    this.input = this.output = socket;
    this.gone = closed(socket).then(() => new SidecarExitedError({ code: null, signal: null }, ""));
  }

  /** Connects to the Unix socket, or the named pipe, at `path`; rejects with SidecarStartError if nobody listens. */
  static connect(path: string): Promise<SidecarSocket> {
    return new Promise((resolve, reject) => {
      const socket = connect(path);
      socket.once("connect", () => resolve(new SidecarSocket(socket)));
      // For as long as it lives: that it breaks is told by its end.
      socket.on("error", (cause: NodeJS.ErrnoException) => {
        const reason = `Nobody listens at ${path} (${cause.code ?? cause.message}).`;
        reject(new SidecarStartError(`${reason} Start 'mlx-sidecar serve --listen' there.`, { cause }));
      });
    });
  }

  holdEventLoop(hold: boolean): void {
    if (hold) this.input.ref();
    else this.input.unref();
  }

  kill(): void {
    this.input.destroy();
  }

  async end(): Promise<SidecarExitedError> {
    this.holdEventLoop(true);
    this.output.end();
    if (!(await within(this.gone, PATIENCE_MS))) this.kill();
    return this.gone;
  }
}

/**
 * Starts a sidecar that connects back, over a socket in a folder that only this user can look into and that is
 * gone again when this settles.
 *
 * @throws SidecarStartError if the program is missing
 * @throws SidecarExitedError if it ends instead of connecting
 */
export async function startOverSocket(options: ProcessOptions, signal?: AbortSignal): Promise<SidecarProcess> {
  const folder = mkdtempSync(join(tmpdir(), "mlx-sidecar-"));
  const remove = () => rmSync(folder, { recursive: true, force: true });
  const callOff = atHostExit(remove);
  const server = createServer();
  server.maxConnections = 1;
  try {
    const path = join(folder, "wire");
    await once(server.listen(path), "listening");
    const args = [...(options.args ?? ["serve"]), "--pipe", path];
    const sidecar = await SidecarProcess.start({ ...options, args });
    await sidecar.speakOver(caller(server, sidecar, signal));
    return sidecar;
  } finally {
    server.close();
    callOff();
    remove();
  }
}

/** The connection that `sidecar` makes; when `signal` aborts before that it is ended. */
function caller(server: Server, sidecar: SidecarProcess, signal: AbortSignal | undefined): Promise<Socket> {
  return new Promise((resolve, reject) => {
    const abort = () => sidecar.kill();
    if (signal?.aborted) abort();
    else signal?.addEventListener("abort", abort, { once: true });
    void sidecar.gone.then((exit) => reject(signal?.aborted ? startError(signal.reason, exit.stderrTail) : exit));
    server.once("connection", (socket) => {
      signal?.removeEventListener("abort", abort);
      resolve(socket);
    });
  });
}
