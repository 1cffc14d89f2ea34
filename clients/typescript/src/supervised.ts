import { SidecarClient } from "./client.js";
import type { ExitStatus } from "./errors.js";
import type { InitializeResult } from "./generated/protocol.js";
import { Supervisor, type SuperviseOptions } from "./supervisor.js";

/**
 * A sidecar that is started again when it ends, with the models that were loaded.
 *
 * What was in flight is rejected with SidecarExitedError and never repeated. What is asked while there is no
 * sidecar waits for the next, for as long as its `signal` and `timeoutMs` let it, or is rejected with
 * SidecarGaveUpError.
 */
export class SupervisedSidecar extends SidecarClient {
  readonly #supervisor: Supervisor;

  private constructor(supervisor: Supervisor) {
    super(supervisor, supervisor.session.windowBytes);
    this.#supervisor = supervisor;
  }

  /** Starts a sidecar and waits until it answers; rejects as `Sidecar.spawn` does, and then starts no other. */
  static async spawn(options: SuperviseOptions = {}): Promise<SupervisedSidecar> {
    return new SupervisedSidecar(await Supervisor.start(options));
  }

  get info(): InitializeResult {
    return this.#supervisor.session.info;
  }

  get pid(): number | undefined {
    return this.#supervisor.isRunning ? this.#supervisor.session.transport.pid : undefined;
  }

  async close(): Promise<ExitStatus> {
    const { code, signal } = await this.#supervisor.close();
    return { code, signal };
  }
}
