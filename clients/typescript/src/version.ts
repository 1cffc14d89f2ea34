/** The version of this package; a constant, because package.json is nowhere in particular once a host is bundled. */
export const VERSION = "0.1.0";
