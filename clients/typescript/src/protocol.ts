/**
 * The messages of the wire, as `protocol/messages.py` defines them.
 *
 * Durations are milliseconds, sizes are bytes. Objects that the server sends may gain members.
 */

export const PROTOCOL_VERSION = 1;

export type ModelState = "loading" | "ready" | "unloading" | "unloaded";
export type EngineState = "starting" | "ready" | "failed" | "stopping";
export type FinishReason = "stop" | "length" | "cancelled";

export interface InitializeParams {
  protocolVersion: number;
  clientInfo?: { name: string; version?: string };
  /** The host's process; the server ends when it is gone. */
  processId?: number | null;
  capabilities?: Record<string, unknown>;
}

export interface InitializeResult {
  protocolVersion: number;
  serverInfo: { name: string; version: string };
  capabilities: Record<string, boolean>;
  limits: { maxFrameBytes: number };
  instanceId: string;
}

export interface PingResult {
  state: EngineState;
  uptimeMs: number;
  inFlight: number;
  lastStepAgeMs: number | null;
}

export interface LoadParams {
  /** A name that `mlx-sidecar pull` brought, an absolute folder, or a hub id in the hub's cache. */
  model: string;
  dtype?: "auto" | "stored" | "float32" | "float16" | "bfloat16";
}

export interface LoadResult {
  model: string;
  state: ModelState;
  dtype: string;
  /** Why `dtype` is not the stored one, where it is not. */
  reason?: string;
  parameters: number;
  contextLength: number;
  vocabulary: number;
  bytes: number;
  loadMs: number;
  phases: { runtimeMs: number; weightsMs: number; warmupMs: number };
  pages?: { residentBytes: number; totalBytes: number };
}

export interface UnloadParams {
  model: string;
  /** End the model's requests instead of waiting for them. */
  force?: boolean;
}

export interface UnloadResult {
  model: string;
  state: ModelState;
}

export interface ModelInfo {
  model: string;
  state: ModelState;
  inUse: number;
  dtype?: string;
  parameters?: number;
  contextLength?: number;
  bytes?: number;
}

export interface ModelsResult {
  models: ModelInfo[];
}

export interface Message {
  role: "system" | "user" | "assistant" | "tool";
  content: string;
}

/** Exactly one of `messages`, `prompt` and `tokens`, and how to sample. */
export interface GenerateParams {
  model: string;
  messages?: Message[];
  prompt?: string;
  tokens?: number[];
  maxTokens?: number;
  temperature?: number;
  topP?: number;
  topK?: number;
  minP?: number;
  repetitionPenalty?: number;
  presencePenalty?: number;
  frequencyPenalty?: number;
  logitBias?: Record<number, number>;
  seed?: number | null;
  stop?: string | string[];
  stopTokenIds?: number[];
  partialResultToken?: string | number;
}

export interface GenerateProgress {
  seq: number;
  text: string;
  tokens: number[];
}

export interface GenerateResult {
  finishReason: FinishReason;
  usage: { promptTokens: number; completionTokens: number };
  timings: {
    queueMs: number;
    prefillMs: number;
    ttftMs: number;
    decodeMs: number;
    tokensPerSecond: number;
  };
  /** Present when the answer was not streamed. */
  text?: string;
  tokens?: number[];
  /** Present when it was. */
  lastSeq?: number;
}

export interface TokenizeParams {
  model: string;
  text?: string;
  messages?: Message[];
  addSpecialTokens?: boolean;
}

export interface TokenizeResult {
  tokens: number[];
}

export interface DetokenizeParams {
  model: string;
  tokens: number[];
  skipSpecialTokens?: boolean;
}

export interface DetokenizeResult {
  text: string;
}

/** What every native component says of itself. */
export interface NativeComponent {
  active: boolean;
  reason?: string;
}

export interface StatsResult {
  uptimeMs: number;
  memory: {
    residentBytes: number;
    peakResidentBytes: number;
    mlxActiveBytes: number;
    mlxCacheBytes: number;
    mlxPeakBytes: number;
  };
  requests: { started: number; finished: number; cancelled: number; failed: number };
  tokens: { prompt: number; completion: number };
  engine: {
    state: EngineState;
    steps: number;
    sequences: number;
    device?: string;
    mlxVersion?: string;
    startMs?: number;
  };
  models: ModelInfo[];
  native: {
    blas: NativeComponent & { library?: string; threads?: number; calls?: number };
    pages: NativeComponent & { queries?: number };
  };
}

/** `$/cancelRequest`. */
export interface CancelParams {
  id: number | string;
}

/** `$/progress`: `token` is the `partialResultToken` of the request that this belongs to. */
export interface ProgressParams {
  token: number | string;
  value: GenerateProgress;
}

/** Method name to what it takes and gives. */
export interface Methods {
  initialize: { params: InitializeParams; result: InitializeResult };
  ping: { params: Record<string, never>; result: PingResult };
  load: { params: LoadParams; result: LoadResult };
  unload: { params: UnloadParams; result: UnloadResult };
  models: { params: Record<string, never>; result: ModelsResult };
  generate: { params: GenerateParams; result: GenerateResult };
  tokenize: { params: TokenizeParams; result: TokenizeResult };
  detokenize: { params: DetokenizeParams; result: DetokenizeResult };
  stats: { params: Record<string, never>; result: StatsResult };
  shutdown: { params: Record<string, never>; result: null };
}
