import type { Channel } from "./channel.js";
import { Deadline, type RequestOptions } from "./deadline.js";
import type { ExitStatus } from "./errors.js";
import type * as wire from "./generated/protocol.js";
import { Generation } from "./generation.js";

type Params<M extends keyof wire.Methods> = wire.Methods[M]["params"];
type Result<M extends keyof wire.Methods> = wire.Methods[M]["result"];
/** The connection has its own names for what is told on the way. */
type Untold<Asked> = Omit<Asked, "partialResultToken">;

export interface ProgressOptions<Progress> extends RequestOptions {
  /** Called with how far it is, until it is done. What this throws rejects the promise, and ends the request. */
  onProgress?: ((progress: Progress) => void) | undefined;
}

/** What a sidecar can be asked, whoever keeps it running. */
export abstract class SidecarClient implements AsyncDisposable {
  readonly #channel: Channel;
  readonly #windowBytes: number;

  protected constructor(channel: Channel, windowBytes: number) {
    this.#channel = channel;
    this.#windowBytes = windowBytes;
  }

  /** What the server said of itself when it was connected to. */
  abstract get info(): wire.InitializeResult;

  /** The id of the sidecar's process, if it was started here and there is one now. */
  abstract get pid(): number | undefined;

  /** Ends what this has started or connected to, by force if it must be; resolves with how it ended. */
  abstract close(): Promise<ExitStatus>;

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  /** Loads a model; when this resolves the model is evaluated and warm. */
  load(
    model: string | Untold<wire.LoadParams>,
    options?: ProgressOptions<wire.LoadProgress>,
  ): Promise<wire.LoadResult> {
    return this.#request("load", typeof model === "string" ? { model } : model, options);
  }

  /** Reads a loaded model anew, as its files are now, while the old one serves; if that fails, the old one stays. */
  reload(model: string, options?: ProgressOptions<wire.LoadProgress>): Promise<wire.LoadResult> {
    return this.#request("reload", { model }, options);
  }

  /** Unloads a model after its requests have ended. */
  unload(model: string | wire.UnloadParams, options?: RequestOptions): Promise<wire.UnloadResult> {
    return this.#request("unload", typeof model === "string" ? { model } : model, options);
  }

  /** Gives a loaded model another name, moves that to another model, or takes it away: `model` null. */
  alias(params: wire.AliasParams, options?: RequestOptions): Promise<wire.AliasResult> {
    return this.#request("alias", params, options);
  }

  /** The models that were loaded, whether they are in memory now or not. */
  async models(options?: RequestOptions): Promise<wire.ModelInfo[]> {
    return (await this.#request("models", {}, options)).models;
  }

  /** Brings a model onto the sidecar's machine. */
  pull(
    model: string | Untold<wire.PullParams>,
    options?: ProgressOptions<wire.PullProgress>,
  ): Promise<wire.PullResult> {
    return this.#request("pull", typeof model === "string" ? { model } : model, options);
  }

  /** Loads a LoRA adapter beside a loaded model; `generate` takes its name as `adapter`. */
  loadAdapter(params: wire.LoadAdapterParams, options?: RequestOptions): Promise<wire.LoadAdapterResult> {
    return this.#request("loadAdapter", params, options);
  }

  /** Unloads an adapter after its requests have ended. */
  unloadAdapter(params: wire.UnloadAdapterParams, options?: RequestOptions): Promise<wire.UnloadAdapterResult> {
    return this.#request("unloadAdapter", params, options);
  }

  /** Starts generating at once and returns the answer, to be iterated over as it grows. */
  generate(params: Untold<wire.GenerateParams>, options: RequestOptions = {}): Generation {
    const deadline = new Deadline(options);
    const { signal } = deadline;
    const ask = (onProgress: (part: wire.GenerateProgress) => void) =>
      this.#channel.request("generate", params, { signal, onProgress });
    const generation = new Generation(ask, this.#windowBytes, options.signal);
    generation.result.then(deadline.clear, deadline.clear);
    return generation;
  }

  /** Text or messages to ids. */
  tokenize(params: wire.TokenizeParams, options?: RequestOptions): Promise<wire.TokenizeResult> {
    return this.#request("tokenize", params, options);
  }

  /** Ids to text. */
  detokenize(params: wire.DetokenizeParams, options?: RequestOptions): Promise<wire.DetokenizeResult> {
    return this.#request("detokenize", params, options);
  }

  /** What the sidecar is doing and holding. */
  stats(options?: RequestOptions): Promise<wire.StatsResult> {
    return this.#request("stats", {}, options);
  }

  /** Answers at once, whatever the model is doing. */
  ping(options?: RequestOptions): Promise<wire.PingResult> {
    return this.#request("ping", {}, options);
  }

  async #request<M extends keyof wire.Methods>(
    method: M,
    params: Params<M>,
    { onProgress, ...options }: ProgressOptions<wire.Methods[M]["progress"]> = {},
  ): Promise<Result<M>> {
    const deadline = new Deadline(options);
    const { signal } = deadline;
    try {
      return await this.#channel.request(method, params, { signal, onProgress }).response;
    } finally {
      deadline.clear();
    }
  }
}
