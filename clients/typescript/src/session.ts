import { Connection } from "./connection.js";
import { Deadline } from "./deadline.js";
import { SidecarStartError, startError, type SidecarExitedError } from "./errors.js";
import { PROTOCOL_VERSION, type InitializeResult } from "./generated/protocol.js";
import { SidecarProcess, type ProcessOptions } from "./process.js";
import { SidecarSocket, startOverSocket } from "./socket.js";
import { closed, within, type Transport } from "./transport.js";
import { VERSION } from "./version.js";

const START_TIMEOUT_MS = 30_000;
const SHUTDOWN_TIMEOUT_MS = 2_000;
const WINDOW_BYTES = 256 * 1024;

export interface ConnectOptions {
  /** How long the sidecar may take to answer `initialize`; 30 seconds by default. */
  startTimeoutMs?: number;
  /** Aborting gives up the start, and ends what was started. It means nothing after that. */
  signal?: AbortSignal;
  /** How much of an answer the server sends ahead of its reader, in bytes of text; 256 KiB by default. */
  windowBytes?: number;
}

export interface SpawnOptions extends ConnectOptions, ProcessOptions {
  /** What to speak over: the process's stdin and stdout, or a Unix socket that it connects to. */
  transport?: "stdio" | "pipe";
}

/** A connection that is open, and the transport under it. */
export class Session {
  readonly transport: Transport;
  readonly connection: Connection;
  /** What the server said of itself. */
  readonly info: InitializeResult;
  readonly windowBytes: number;
  #closing: Promise<SidecarExitedError> | undefined;

  private constructor(transport: Transport, connection: Connection, info: InitializeResult, windowBytes: number) {
    this.transport = transport;
    this.connection = connection;
    this.info = info;
    this.windowBytes = windowBytes;
  }

  /** Starts a sidecar and opens a connection to it; in the `background` that does not keep the host alive. */
  static spawn(options: SpawnOptions, background = false): Promise<Session> {
    const start = options.transport === "pipe" ? startOverSocket : SidecarProcess.start;
    return Session.open((signal) => start(options, signal), options, background);
  }

  /** Opens a connection to a sidecar that listens at `path`. */
  static connect(path: string, options: ConnectOptions): Promise<Session> {
    return Session.open(() => SidecarSocket.connect(path), options);
  }

  /** Opens a connection over what `reach` finds; what it found is ended if that fails. */
  static async open(
    reach: (signal: AbortSignal | undefined) => Promise<Transport>,
    { startTimeoutMs = START_TIMEOUT_MS, windowBytes = WINDOW_BYTES, signal }: ConnectOptions,
    background = false,
  ): Promise<Session> {
    const deadline = new Deadline({ signal, timeoutMs: startTimeoutMs });
    try {
      deadline.signal?.throwIfAborted();
      const transport = await reach(deadline.signal);
      if (background) transport.holdEventLoop(false);
      const connection = new Connection(transport.input, transport.output, (busy) => transport.holdEventLoop(busy));
      void transport.gone.then((error) => connection.close(error));
      // Whoever stops talking will not answer any more.
      void closed(transport.input).then(() => transport.end());
      try {
        const params = { ...greeting(transport), flowControl: { windowBytes } };
        const options = { signal: deadline.signal, background };
        const info = await connection.request("initialize", params, options).response;
        check(info);
        connection.maxFrameBytes = info.limits.maxFrameBytes;
        return new Session(transport, connection, info, windowBytes);
      } catch (error) {
        if (deadline.signal?.aborted) transport.kill();
        const { stderrTail } = await transport.end();
        throw startError(error, stderrTail);
      }
    } finally {
      deadline.clear();
    }
  }

  /** Ends the sidecar in order, by force if it must be; one that was connected to loses this connection only. */
  close(): Promise<SidecarExitedError> {
    this.#closing ??= this.#close();
    return this.#closing;
  }

  async #close(): Promise<SidecarExitedError> {
    // It may be gone already, or too busy to answer; it is ended all the same.
    const answered = this.connection.request("shutdown", {}).response.catch(() => {});
    if (await within(answered, SHUTDOWN_TIMEOUT_MS)) this.connection.notify("exit", {});
    return this.transport.end();
  }
}

function greeting(transport: Transport) {
  const clientInfo = { name: "mlx-sidecar-typescript", version: VERSION };
  // A sidecar that serves others too has no reason to end with this process.
  const processId = transport.pid === undefined ? null : process.pid;
  return { protocolVersion: PROTOCOL_VERSION, clientInfo, processId };
}

/** Throws if the server is one that this client cannot speak to, whatever its answer is. */
function check(info: Partial<InitializeResult> | null | undefined): void {
  const advice = "Install a client and a sidecar of one release.";
  if (info?.protocolVersion !== PROTOCOL_VERSION) {
    const versions = `version ${info?.protocolVersion} of the protocol, and this client version ${PROTOCOL_VERSION}`;
    throw new SidecarStartError(`The sidecar speaks ${versions}. ${advice}`);
  }
  if (typeof info.limits?.maxFrameBytes !== "number") {
    throw new SidecarStartError(`The sidecar does not say how long a message may be. ${advice}`);
  }
}
