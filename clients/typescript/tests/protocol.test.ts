/** The types of this package against the definitions of the protocol, which are in Python. */

import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";

import ts from "typescript";

const timeout = 60_000;

/** Prints every message as a shape: names to shapes, `?` after a name that may be absent, unions sorted. */
const PYTHON = `
import json
from msgspec import inspect
from mlx_sidecar.protocol import errors, methods, messages

def shape(info):
    match info:
        case inspect.StructType():
            return {f.encode_name + ("" if f.required else "?"): shape(f.type) for f in info.fields}
        case inspect.UnionType():
            return union(shape(member) for member in info.types)
        case inspect.LiteralType():
            return union(json.dumps(value) for value in info.values)
        case inspect.ListType():
            return [shape(info.item_type)]
        case inspect.DictType():
            return {"*": shape(info.value_type)}
    plain = {"Int": "number", "Float": "number", "Str": "string", "Bool": "boolean", "None": "null", "Any": "any"}
    return plain[type(info).__name__.removesuffix("Type")]

def union(members):
    members = sorted(members, key=json.dumps)
    return members[0] if len(members) == 1 else {"|": members}

def of(kind):
    return "null" if kind is None else shape(inspect.type_info(kind))

def kinds(error):
    return {error.kind}.union(*(kinds(other) for other in error.__subclasses__()))

print(json.dumps({
    "version": messages.PROTOCOL_VERSION,
    "methods": {name: {"params": of(m.params), "result": of(m.result)} for name, m in methods.METHODS.items()},
    "cancel": of(messages.CancelParams),
    "progress": of(messages.ProgressParams),
    "kinds": sorted(kinds(errors.SidecarError)),
}))
`;

interface Definitions {
  version: number;
  methods: Record<string, unknown>;
  cancel: unknown;
  progress: unknown;
  kinds: string[];
}

async function python(): Promise<Definitions> {
  const { stdout } = await promisify(execFile)("python", ["-c", PYTHON]);
  return JSON.parse(stdout) as Definitions;
}

function typescript(): Definitions {
  const file = (name: string) => fileURLToPath(new URL(`../../src/${name}.ts`, import.meta.url));
  const options = { strict: true, exactOptionalPropertyTypes: true };
  const program = ts.createProgram([file("protocol"), file("errors")], options);
  const checker = program.getTypeChecker();
  const type = (name: string, from: string): ts.Type => {
    const source = program.getSourceFile(file(from)) ?? assert.fail(`no ${from}.ts`);
    const module = checker.getSymbolAtLocation(source) ?? assert.fail(`${from}.ts exports nothing`);
    const symbol = checker.getExportsOfModule(module).find((exported) => exported.name === name);
    const found = symbol ?? assert.fail(`${from}.ts has no ${name}`);
    const isType = (found.flags & ts.SymbolFlags.Type) !== 0;
    return isType ? checker.getDeclaredTypeOfSymbol(found) : checker.getTypeOfSymbol(found);
  };
  const kinds = type("ErrorKind", "errors");
  return {
    version: (type("PROTOCOL_VERSION", "protocol") as ts.NumberLiteralType).value,
    methods: shape(type("Methods", "protocol"), checker) as Record<string, unknown>,
    cancel: shape(type("CancelParams", "protocol"), checker),
    progress: shape(type("ProgressParams", "protocol"), checker),
    kinds: (kinds.isUnion() ? kinds.types : [kinds]).map((kind) => (kind as ts.StringLiteralType).value).sort(),
  };
}

function shape(type: ts.Type, checker: ts.TypeChecker): unknown {
  const plain: [ts.TypeFlags, string][] = [
    [ts.TypeFlags.StringLiteral, checker.typeToString(type)],
    [ts.TypeFlags.NumberLike, "number"],
    [ts.TypeFlags.String, "string"],
    [ts.TypeFlags.BooleanLike, "boolean"],
    [ts.TypeFlags.Null, "null"],
    [ts.TypeFlags.Unknown, "any"],
  ];
  const name = plain.find(([flag]) => (type.flags & flag) !== 0)?.[1];
  if (name !== undefined) return name;
  if (type.isUnion()) {
    // An optional member has `undefined` in its type, and `boolean` may have come apart into its two values.
    const present = type.types.filter((member) => (member.flags & ts.TypeFlags.Undefined) === 0);
    const members = new Set(present.map((member) => JSON.stringify(shape(member, checker))));
    const [first, ...others] = [...members].sort().map((member) => JSON.parse(member) as unknown);
    return others.length === 0 ? first : { "|": [first, ...others] };
  }
  if (checker.isArrayType(type)) {
    return checker.getTypeArguments(type as ts.TypeReference).map((item) => shape(item, checker));
  }
  const index = checker.getIndexInfosOfType(type)[0];
  // Record<string, never> is how an empty object is written down.
  if (index !== undefined) return index.type.flags & ts.TypeFlags.Never ? {} : { "*": shape(index.type, checker) };
  const members = type.getProperties().map((member) => {
    const optional = (member.flags & ts.SymbolFlags.Optional) !== 0;
    return [`${member.name}${optional ? "?" : ""}`, shape(checker.getTypeOfSymbol(member), checker)];
  });
  return Object.fromEntries(members);
}

test("every message has the members, the types and the error kinds that the server has", { timeout }, async () => {
  const [theirs, ours] = [await python(), typescript()];
  assert(Object.keys(theirs.methods).length > 5);
  assert.deepEqual(ours, theirs);
});
