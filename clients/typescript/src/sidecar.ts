import { Connection, type RequestOptions } from "./connection.js";
import { SidecarSpawnError, lastWords, type ExitStatus } from "./errors.js";
import { Generation } from "./generation.js";
import { SidecarProcess, within, type ProcessOptions } from "./process.js";
import {
  PROTOCOL_VERSION,
  type DetokenizeParams,
  type DetokenizeResult,
  type GenerateParams,
  type InitializeResult,
  type LoadParams,
  type LoadResult,
  type Methods,
  type ModelInfo,
  type PingResult,
  type StatsResult,
  type TokenizeParams,
  type TokenizeResult,
  type UnloadParams,
  type UnloadResult,
} from "./protocol.js";

const START_TIMEOUT_MS = 30_000;
const SHUTDOWN_TIMEOUT_MS = 2_000;

export interface SpawnOptions extends ProcessOptions {
  /** How long the process may take to answer `initialize`. */
  startTimeoutMs?: number;
}

/** A sidecar process and the connection to it. While nothing is in flight it does not keep the host alive. */
export class Sidecar implements AsyncDisposable {
  /** What the server said of itself at the start. */
  readonly info: InitializeResult;
  /** Settles when the process has ended, however; never rejects. Waiting for it does not keep the host alive. */
  readonly exited: Promise<ExitStatus>;
  readonly #process: SidecarProcess;
  readonly #connection: Connection;
  #generations = 0;
  #closing: Promise<ExitStatus> | undefined;

  private constructor(process: SidecarProcess, connection: Connection, info: InitializeResult) {
    this.#process = process;
    this.#connection = connection;
    this.info = info;
    this.exited = process.exited;
  }

  /**
   * Starts a sidecar and waits until it answers.
   *
   * @throws SidecarSpawnError if the program is missing or does not answer in time
   * @throws SidecarExitedError if it ends instead
   */
  static async spawn(options: SpawnOptions = {}): Promise<Sidecar> {
    const child = await SidecarProcess.start(options);
    const { stdout, stdin } = child.child;
    const connection = new Connection(stdout, stdin, (busy) => child.holdEventLoop(busy));
    void child.exited.then((status) => connection.close(child.exitError(status)));
    const { response } = connection.request("initialize", {
      protocolVersion: PROTOCOL_VERSION,
      clientInfo: { name: "mlx-sidecar-typescript" },
      processId: process.pid,
    });
    try {
      const timeout = options.startTimeoutMs ?? START_TIMEOUT_MS;
      if (!(await within(response, timeout))) {
        child.child.kill("SIGKILL");
        throw new SidecarSpawnError(`The sidecar did not answer within ${timeout} ms.${lastWords(child.stderrTail)}`);
      }
      const info = await response;
      connection.maxFrameBytes = info.limits.maxFrameBytes;
      return new Sidecar(child, connection, info);
    } catch (error) {
      await child.end();
      throw error;
    }
  }

  /** The id of the sidecar's process. */
  get pid(): number | undefined {
    return this.#process.child.pid;
  }

  /** Loads a model; when this resolves the model is evaluated and warm. */
  load(model: string | LoadParams, options?: RequestOptions): Promise<LoadResult> {
    return this.#request("load", typeof model === "string" ? { model } : model, options);
  }

  /** Unloads a model after its requests have ended. */
  unload(model: string | UnloadParams, options?: RequestOptions): Promise<UnloadResult> {
    return this.#request("unload", typeof model === "string" ? { model } : model, options);
  }

  /** The models in memory. */
  async models(options?: RequestOptions): Promise<ModelInfo[]> {
    return (await this.#request("models", {}, options)).models;
  }

  /** Starts generating at once and returns the answer, to be iterated over as it grows. */
  generate(params: Omit<GenerateParams, "partialResultToken">, options: RequestOptions = {}): Generation {
    const token = `generate-${++this.#generations}`;
    return new Generation(this.#connection, token, params, options);
  }

  /** Text or messages to ids. */
  tokenize(params: TokenizeParams, options?: RequestOptions): Promise<TokenizeResult> {
    return this.#request("tokenize", params, options);
  }

  /** Ids to text. */
  detokenize(params: DetokenizeParams, options?: RequestOptions): Promise<DetokenizeResult> {
    return this.#request("detokenize", params, options);
  }

  /** What the sidecar is doing and holding. */
  stats(options?: RequestOptions): Promise<StatsResult> {
    return this.#request("stats", {}, options);
  }

  /** Answers at once, whatever the model is doing. */
  ping(options?: RequestOptions): Promise<PingResult> {
    return this.#request("ping", {}, options);
  }

  /** Ends the process in order, by force if it must be; resolves with how it ended. */
  close(): Promise<ExitStatus> {
    this.#closing ??= this.#close();
    return this.#closing;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  async #close(): Promise<ExitStatus> {
    // It may be gone already, or too busy to answer; it is ended all the same.
    const answered = this.#request("shutdown", {}).catch(() => {});
    if (await within(answered, SHUTDOWN_TIMEOUT_MS)) this.#connection.notify("exit", {});
    return this.#process.end();
  }

  #request<M extends keyof Methods>(
    method: M,
    params: Methods[M]["params"],
    options?: RequestOptions,
  ): Promise<Methods[M]["result"]> {
    return this.#connection.request(method, params, options).response;
  }
}
