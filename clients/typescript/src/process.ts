import { spawn, type ChildProcessWithoutNullStreams } from "node:child_process";
import type { Socket } from "node:net";

import { SidecarExitedError, SidecarSpawnError, type ExitStatus } from "./errors.js";

const STDERR_TAIL_BYTES = 8 * 1024;
const PATIENCE_MS = 2_000;

export interface ProcessOptions {
  /** The program; `mlx-sidecar` on the PATH by default, or what MLX_SIDECAR_COMMAND says. */
  command?: string;
  /** Its arguments; `["serve"]` by default. */
  args?: string[];
  /** Its environment; this process's by default. */
  env?: NodeJS.ProcessEnv;
  /** Called with every chunk of its log. Without it the log is kept only for error messages. */
  onLog?: (text: string) => void;
}

/** The child process: started without a shell, its stderr always drained, its end told once. */
export class SidecarProcess {
  readonly child: ChildProcessWithoutNullStreams;
  /** Settles when the process has ended; never rejects. */
  readonly exited: Promise<ExitStatus>;
  #stderrTail = Buffer.alloc(0);

  private constructor(child: ChildProcessWithoutNullStreams, onLog: ((text: string) => void) | undefined) {
    this.child = child;
    this.exited = new Promise((resolve) => {
      child.once("close", (code, signal) => resolve({ code, signal }));
    });
    child.stderr.on("data", (chunk: Buffer) => {
      this.#stderrTail = Buffer.concat([this.#stderrTail, chunk]).subarray(-STDERR_TAIL_BYTES);
      onLog?.(chunk.toString("utf8"));
    });
  }

  /** Starts the process; rejects with SidecarSpawnError if the program is not there. */
  static async start(options: ProcessOptions): Promise<SidecarProcess> {
    const command = options.command ?? process.env["MLX_SIDECAR_COMMAND"] ?? "mlx-sidecar";
    const child = spawn(command, options.args ?? ["serve"], {
      env: options.env ?? process.env,
      stdio: "pipe",
    });
    const started = new SidecarProcess(child, options.onLog);
    await new Promise<void>((resolve, reject) => {
      child.once("spawn", resolve);
      child.once("error", (error: NodeJS.ErrnoException) => {
        const hint = error.code === "ENOENT" ? " Install the Python package, or pass its path as `command`." : "";
        reject(new SidecarSpawnError(`${command} could not be started (${error.code}).${hint}`, { cause: error }));
      });
    });
    return started;
  }

  /** The error to fail requests with once the process has ended with `status`. */
  exitError(status: ExitStatus): SidecarExitedError {
    return new SidecarExitedError(status, this.#stderrTail.toString("utf8").trim());
  }

  /** Lets this process keep the host's event loop alive, or not. */
  holdEventLoop(hold: boolean): void {
    const handles = [this.child, ...([this.child.stdin, this.child.stdout, this.child.stderr] as unknown as Socket[])];
    for (const handle of handles) hold ? handle.ref() : handle.unref();
  }

  /** Closes stdin and waits; then asks by SIGTERM and waits; then kills. */
  async end(): Promise<ExitStatus> {
    this.holdEventLoop(true);
    this.child.stdin.end();
    if (!(await within(this.exited, PATIENCE_MS))) this.child.kill("SIGTERM");
    if (!(await within(this.exited, PATIENCE_MS))) this.child.kill("SIGKILL");
    return this.exited;
  }
}

/** True if `promise` settles within `ms`. */
export async function within(promise: Promise<unknown>, ms: number): Promise<boolean> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<boolean>((resolve) => {
    timer = setTimeout(() => resolve(false), ms);
  });
  try {
    return await Promise.race([promise.then(() => true), late]);
  } finally {
    clearTimeout(timer);
  }
}
