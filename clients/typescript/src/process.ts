import { spawn, type ChildProcessWithoutNullStreams } from "node:child_process";
import { once } from "node:events";
import type { Socket } from "node:net";

import { SidecarExitedError, SidecarSpawnError, type ExitStatus } from "./errors.js";

const STDERR_TAIL_CHARACTERS = 8 * 1024;
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
  /** Settles when the process has ended and all that it said has been read; never rejects. */
  readonly exited: Promise<ExitStatus>;
  readonly #streams: Socket[];
  #stderrTail = "";
  #ending: Promise<ExitStatus> | undefined;

  private constructor(child: ChildProcessWithoutNullStreams, onLog: ((text: string) => void) | undefined) {
    this.child = child;
    this.#streams = [child.stdin, child.stdout, child.stderr] as unknown as Socket[];
    this.exited = new Promise((resolve) => {
      child.once("close", (code, signal) => resolve({ code, signal }));
    });
    child.once("exit", () => this.#stopReadingSoon());
    child.stderr.on("error", () => {});
    child.stderr.setEncoding("utf8").on("data", (text: string) => {
      this.#stderrTail = (this.#stderrTail + text).slice(-STDERR_TAIL_CHARACTERS);
      onLog?.(text);
    });
  }

  /** Starts the process; rejects with SidecarSpawnError if the program is not there. */
  static async start(options: ProcessOptions): Promise<SidecarProcess> {
    const command = options.command ?? (process.env["MLX_SIDECAR_COMMAND"] || "mlx-sidecar");
    try {
      const child = spawn(command, options.args ?? ["serve"], { env: options.env ?? process.env, stdio: "pipe" });
      // For as long as it lives: a signal that cannot be sent is an error too, and must not end the host.
      child.on("error", () => {});
      await once(child, "spawn");
      return new SidecarProcess(child, options.onLog);
    } catch (cause) {
      // Some reasons are events, others are thrown; the streams may be missing in both cases.
      const { code, message } = cause as NodeJS.ErrnoException;
      const hint = code === "ENOENT" ? " Install the Python package, or pass its path as `command`." : "";
      throw new SidecarSpawnError(`${command} could not be started (${code ?? message}).${hint}`, { cause });
    }
  }

  /** The last of what the process wrote to stderr. */
  get stderrTail(): string {
    return this.#stderrTail.trim();
  }

  /** Lets this process keep the host's event loop alive, or not. */
  holdEventLoop(hold: boolean): void {
    for (const handle of [this.child, ...this.#streams]) {
      if (hold) handle.ref();
      else handle.unref();
    }
  }

  /** The error to fail requests with once the process has ended with `status`. */
  exitError(status: ExitStatus): SidecarExitedError {
    return new SidecarExitedError(status, this.stderrTail);
  }

  /** Closes stdin and waits; then asks by SIGTERM and waits; then kills. */
  end(): Promise<ExitStatus> {
    this.#ending ??= this.#end();
    return this.#ending;
  }

  async #end(): Promise<ExitStatus> {
    this.holdEventLoop(true);
    this.child.stdin.end();
    if (!(await within(this.exited, PATIENCE_MS))) this.child.kill("SIGTERM");
    if (!(await within(this.exited, PATIENCE_MS))) this.child.kill("SIGKILL");
    return this.exited;
  }

  /** A process that it started may have inherited its pipes and keep them open for ever. */
  #stopReadingSoon(): void {
    const timer = setTimeout(() => {
      for (const stream of this.#streams) stream.destroy();
    }, PATIENCE_MS).unref();
    this.child.once("close", () => clearTimeout(timer));
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
