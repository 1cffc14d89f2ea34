import type { Methods } from "./generated/protocol.js";

export interface SendOptions<M extends keyof Methods> {
  /** Aborting rejects the response with the signal's reason at once, and cancels the request on the server. */
  signal?: AbortSignal | undefined;
  /** Called with every progress of the request, all of it before the response. Throwing is like aborting. */
  onProgress?: ((value: Methods[M]["progress"]) => void) | undefined;
  /** This request does not make the connection busy. */
  background?: boolean;
}

/** A request that was sent. */
export interface Request<Result> {
  readonly response: Promise<Result>;
  /** Asks the server to end the request; `response` then says how it ended. */
  cancel(): void;
  /** Tells the server that progress up to `seq` has been dealt with, so that more may come. */
  acknowledge(seq: number): void;
}

/** What requests can be sent through. */
export interface Channel {
  request<M extends keyof Methods>(
    method: M,
    params: Methods[M]["params"],
    options?: SendOptions<M>,
  ): Request<Methods[M]["result"]>;
}

/** What subscribers of `mlx-sidecar:message` in node:diagnostics_channel are given, for every message. */
export interface WireMessage {
  /** The same object for every message of a connection. */
  connection: object;
  direction: "sent" | "received";
  message: unknown;
}
