const actions = new Set<() => unknown>();

function runAll(): void {
  for (const action of actions) action();
}

/**
 * Runs `action` when this process ends by itself, by `process.exit()` or by an uncaught exception. Signals are
 * left as the host has them. Returns what calls it off.
 */
export function atHostExit(action: () => unknown): () => void {
  if (actions.size === 0) process.on("exit", runAll);
  actions.add(action);
  return () => {
    actions.delete(action);
    if (actions.size === 0) process.off("exit", runAll);
  };
}
