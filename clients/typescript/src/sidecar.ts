import { SidecarClient } from "./client.js";
import type { ExitStatus, SidecarExitedError } from "./errors.js";
import type { InitializeResult } from "./generated/protocol.js";
import { Session, type ConnectOptions, type SpawnOptions } from "./session.js";

/** A sidecar and the connection to it. While nothing is in flight it does not keep the host alive. */
export class Sidecar extends SidecarClient {
  /** Settles when the sidecar is gone, however; never rejects. Waiting for it does not keep the host alive. */
  readonly exited: Promise<ExitStatus>;
  readonly #session: Session;

  private constructor(session: Session) {
    super(session.connection, session.windowBytes);
    this.#session = session;
    this.exited = session.transport.gone.then(status);
  }

  /**
   * Starts a sidecar and waits until it answers.
   *
   * @throws SidecarStartError if the program is missing, does not answer in time or speaks another version
   * @throws SidecarExitedError if it ends instead
   */
  static async spawn(options: SpawnOptions = {}): Promise<Sidecar> {
    return new Sidecar(await Session.spawn(options));
  }

  /**
   * Connects to a sidecar that somebody else started with `serve --listen PATH`; `close` leaves it running.
   *
   * @throws SidecarStartError if nobody listens at `path`, does not answer in time or speaks another version
   */
  static async connect(path: string, options: ConnectOptions = {}): Promise<Sidecar> {
    return new Sidecar(await Session.connect(path, options));
  }

  get info(): InitializeResult {
    return this.#session.info;
  }

  get pid(): number | undefined {
    return this.#session.transport.pid;
  }

  async close(): Promise<ExitStatus> {
    await this.#session.close();
    return this.exited;
  }
}

function status({ code, signal }: SidecarExitedError): ExitStatus {
  return { code, signal };
}
