import { spawn, type ChildProcessWithoutNullStreams } from "node:child_process";
import { once } from "node:events";
import type { Socket } from "node:net";
import type { Readable, Writable } from "node:stream";

import { SidecarExitedError, SidecarStartError, type ExitStatus } from "./errors.js";
import { atHostExit } from "./host-exit.js";
import { closed, PATIENCE_MS, within, type Transport } from "./transport.js";

const STDERR_TAIL_CHARACTERS = 8 * 1024;

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

/** A child process as a transport: started without a shell, its stderr always drained, its end told once. */
export class SidecarProcess implements Transport {
  readonly child: ChildProcessWithoutNullStreams;
  readonly gone: Promise<SidecarExitedError>;
  #input: Readable;
  #output: Writable;
  #stderrTail = "";
  #ending: Promise<SidecarExitedError> | undefined;

  private constructor(child: ChildProcessWithoutNullStreams, onLog: ((text: string) => void) | undefined) {
    this.child = child;
    this.#input = child.stdout;
    this.#output = child.stdin;
    const exited = new Promise<ExitStatus>((resolve) => {
      // With `close` all that came through its pipes has been read.
      child.once("close", (code, signal) => resolve({ code, signal }));
    });
    this.gone = exited.then(async (status) => {
      await closed(this.#input);
      return new SidecarExitedError(status, this.#stderrTail.trim());
    });
    child.once("exit", () => this.#stopReadingSoon());
    child.stderr.on("error", () => {});
    child.stderr.setEncoding("utf8").on("data", (text: string) => {
      this.#stderrTail = (this.#stderrTail + text).slice(-STDERR_TAIL_CHARACTERS);
      onLog?.(text);
    });
  }

  /** Starts the process; rejects with SidecarStartError if the program is not there. */
  static async start(options: ProcessOptions): Promise<SidecarProcess> {
    const command = options.command ?? (process.env["MLX_SIDECAR_COMMAND"] || "mlx-sidecar");
    try {
      const child = spawn(command, options.args ?? ["serve"], { env: options.env ?? process.env, stdio: "pipe" });
      // For as long as it lives: a signal that cannot be sent is an error too, and must not end the host.
      child.on("error", () => {});
      child.once("close", atHostExit(() => child.kill("SIGKILL")));
      await once(child, "spawn");
      return new SidecarProcess(child, options.onLog);
    } catch (cause) {
      // Some reasons are events, others are thrown; the streams may be missing in both cases.
      const { code, message } = cause as NodeJS.ErrnoException;
      const hint = code === "ENOENT" ? " Install the Python package, or pass its path as `command`." : "";
      throw new SidecarStartError(`${command} could not be started (${code ?? message}).${hint}`, { cause });
    }
  }

  get input(): Readable {
    return this.#input;
  }

  get output(): Writable {
    return this.#output;
  }

  get pid(): number | undefined {
    return this.child.pid;
  }

  /** Speaks over the socket that is to come, instead of stdin and stdout. */
  async speakOver(socket: Promise<Socket>): Promise<void> {
    // Nothing is expected there from now on, and nothing may fill it up.
    this.child.stdout.on("error", () => {}).resume();
    this.child.stdin.on("error", () => {});
    this.#input = this.#output = await socket;
  }

  holdEventLoop(hold: boolean): void {
    for (const handle of [this.child, ...this.#streams()]) {
      if (hold) handle.ref();
      else handle.unref();
    }
  }

  kill(): void {
    this.child.kill("SIGKILL");
  }

  /** Closes its input and waits; then asks by SIGTERM and waits; then kills. */
  end(): Promise<SidecarExitedError> {
    this.holdEventLoop(true);
    this.#ending ??= this.#end();
    return this.#ending;
  }

  async #end(): Promise<SidecarExitedError> {
    this.#output.end();
    this.child.stdin.end();
    if (!(await within(this.gone, PATIENCE_MS))) this.child.kill("SIGTERM");
    if (!(await within(this.gone, PATIENCE_MS))) this.kill();
    return this.gone;
  }

  /** A process that it started may have inherited its pipes and keep them open for ever. */
  #stopReadingSoon(): void {
    const timer = setTimeout(() => {
      for (const stream of this.#streams()) stream.destroy();
    }, PATIENCE_MS).unref();
    void this.gone.then(() => clearTimeout(timer));
  }

  #streams(): Set<Socket> {
    const { stdin, stdout, stderr } = this.child;
    return new Set([stdin, stdout, stderr, this.#input, this.#output] as unknown as Socket[]);
  }
}
