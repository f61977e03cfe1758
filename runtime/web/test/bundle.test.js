import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { address, openBundle } from "../src/bundle.js";
import { BundleError } from "../src/errors.js";
import { Sha256, sha256 } from "../src/sha256.js";
import { CacheStore } from "../src/store.js";
import { GOLDEN } from "./golden.js";
import { serve } from "./server.js";

const FOLDER = new URL("bundle/", GOLDEN),
  WEIGHTS = "onnx/unet/weights.bin",
  SIZE = 31552;
const read = (name) => readFileSync(new URL(name, FOLDER));

/** Serves the golden bundle while a job runs. */
async function served(handle, job) {
  const server = await serve(FOLDER, handle);
  try {
    return await job(server.url, server.requests);
  } finally {
    await server.close();
  }
}

const oneLine = (pattern) => (e) => {
  assert.ok(e instanceof BundleError, e.stack);
  assert.match(e.message, pattern);
  assert.ok(!e.message.includes("\n"));
  return true;
};

test("hashes of bytes that come in pieces", async () => {
  for (const length of [0, 1, 55, 56, 63, 64, 65, 119, 120, 128, 1000]) {
    const bytes = Uint8Array.from({ length }, (_, i) => i * 7 + length),
      expected = createHash("sha256").update(bytes).digest("hex");
    for (const cut of [0, 1, 63, 64, length]) {
      assert.equal(
        new Sha256().update(bytes.subarray(0, cut)).update(bytes.subarray(cut)).hex(),
        expected,
        `${length} cut at ${cut}`,
      );
    }
    assert.equal(await sha256(bytes), expected);
  }
  assert.equal(
    new Sha256().update(new Uint8Array(2 ** 20 + 3)).hex(),
    createHash("sha256")
      .update(new Uint8Array(2 ** 20 + 3))
      .digest("hex"),
  );
});

test("a bundle is opened at its folder, with or without a slash, or at its manifest; files are checked and progress told", async () => {
  await served(undefined, async (url) => {
    for (const path of ["", "manifest.json"]) assert.equal((await openBundle(url + path)).manifest.sample.height, 8);
  });
  const server = await serve(new URL("../", FOLDER));
  const told = [],
    bundle = await openBundle(`${server.url}bundle`, { onProgress: (each) => told.push(each) });
  bundle.expect([WEIGHTS, "onnx/unet/full.onnx"]);
  assert.deepEqual(Buffer.from(await bundle.file(WEIGHTS)), read(WEIGHTS));
  assert.deepEqual(told.at(-1), { file: WEIGHTS, loaded: SIZE, total: SIZE + 67498 });
  await server.close();
});

test("what is no bundle is refused in one sentence", async () => {
  await served(
    (path, _, response) => path === "SHA256SUMS" && !!response.writeHead(404).end(),
    async (url) => {
      await assert.rejects(
        openBundle(url),
        oneLine(/is not a bundle: SHA256SUMS is missing; expected the address of a folder that export wrote$/),
      );
      await assert.rejects(
        openBundle(`${url}nowhere`),
        oneLine(/nowhere\/ is not a bundle: (manifest.json|SHA256SUMS) is missing/),
      );
    },
  );
  await served(
    (path, _, response) => !!response.writeHead(200).end("<!doctype html>\n<p>Welcome</p>"),
    async (url) => {
      await assert.rejects(
        openBundle(url),
        oneLine(/^manifest.json is not JSON.*expected a bundle that export wrote$/),
      );
    },
  );
  await served(
    (path, _, response) => !!response.writeHead(500).end(),
    async (url) => {
      await assert.rejects(openBundle(url), oneLine(/cannot be fetched from .*: the server answered 500/));
    },
  );
  await assert.rejects(
    openBundle("http://127.0.0.1:1/"),
    oneLine(/^manifest.json cannot be fetched|^SHA256SUMS cannot be fetched/),
  );
  for (const bad of ["", "nothing", "http://", null])
    await assert.rejects(openBundle(bad), oneLine(/it is no address/));
});

test("a newer manifest is told by its version, whatever its sums are", async () => {
  await served(
    (path, _, response) => path === "manifest.json" && !!response.end('{"format_version": 3, "weights": "elsewhere"}'),
    async (url) => {
      await assert.rejects(
        openBundle(url),
        oneLine(/^manifest.json is of format version 3, this runtime reads version 2; update/),
      );
    },
  );
});

test("sums that do not follow from the manifest are refused", async () => {
  for (const change of [(text) => `${text}\n`, (text) => text.slice(1), (text) => text.replace("f", "0"), () => ""]) {
    await served(
      (path, _, response) => path === "SHA256SUMS" && !!response.end(change(read("SHA256SUMS").toString())),
      async (url) => {
        await assert.rejects(openBundle(url), oneLine(/^SHA256SUMS does not agree with manifest.json/));
      },
    );
  }
  await served(
    (path, _, response) => path === "manifest.json" && !!response.end(`${read("manifest.json")} `),
    async (url) => {
      await assert.rejects(openBundle(url), oneLine(/^SHA256SUMS does not agree/));
    },
  );
});

test("paths that leave the bundle are refused, in the manifest too", async () => {
  const base = new URL("http://host/a/bundle/");
  for (const bad of [
    "",
    "/x",
    "../x",
    "a/../x",
    "a//x",
    "./x",
    "a/.",
    "a/",
    "a\\..\\x",
    "C:x",
    "http://evil/x",
    "//evil/x",
    "a\nb",
    "a\0b",
    "\ud800",
  ]) {
    assert.throws(() => address(base, bad), oneLine(/leaves the bundle or is not plain/), JSON.stringify(bad));
  }
  for (const odd of ["%2e%2e/%2e%2e/x", "%2E%2E", "a?b", "a#b", "a b", "é/ß", "..."]) {
    const { href, search } = address(base, odd);
    assert.ok(href.startsWith(base.href) && !search && decodeURIComponent(href.slice(base.href.length)) === odd, href);
  }
  assert.equal(address(new URL("http://host/b/?sig=1"), "c").href, "http://host/b/c?sig=1");
  for (const name of ["../../etc/passwd", "/etc/passwd", "onnx/..\\x"]) {
    const text = read("manifest.json")
      .toString()
      .replace('"files": {', `"files": {"${name.replace("\\", "\\\\")}": {"size": 1, "sha256": "${"0".repeat(64)}"},`);
    await served(
      (path, _, response) => path === "manifest.json" && !!response.end(text),
      async (url) => {
        await assert.rejects(openBundle(url), oneLine(/leaves the bundle/));
      },
    );
  }
  await served(undefined, async (url) => {
    const bundle = await openBundle(url);
    for (const name of ["SHA256SUMS", "x", "__proto__", "constructor"])
      await assert.rejects(bundle.file(name), oneLine(/is not listed in manifest.json/));
    await assert.rejects(bundle.file("../x"), oneLine(/leaves the bundle/));
  });
});

test("a file with another content or size is refused", async () => {
  const bytes = read(WEIGHTS);
  for (const [content, why] of [
    [
      Buffer.concat([bytes.subarray(0, -1), Buffer.of(bytes.at(-1) ^ 1)]),
      /^onnx\/unet\/weights.bin does not have the hash/,
    ],
    [Buffer.concat([bytes, Buffer.of(0)]), /has more than the 31552 bytes/],
    [bytes.subarray(1), /ended after 31551 of 31552 bytes/],
    [Buffer.of(), /ended after 0 of 31552 bytes/],
  ]) {
    await served(
      (path, _, response) => path === WEIGHTS && !!response.end(content),
      async (url) => {
        await assert.rejects((await openBundle(url)).file(WEIGHTS), oneLine(why));
      },
    );
  }
});

/** Ends the connection after some bytes, the first times. */
const breaking = (times, { ranges = true, after = 10000 } = {}) => {
  let left = times;
  return (path, request, response) => {
    if (path !== WEIGHTS) return false;
    const start = ranges ? Number(/^bytes=(\d+)-$/.exec(request.headers.range ?? "")?.[1] ?? 0) : 0,
      rest = read(WEIGHTS).subarray(start);
    response.writeHead(start ? 206 : 200, {
      "content-length": rest.length,
      ...(start ? { "content-range": `bytes ${start}-${SIZE - 1}/${SIZE}` } : {}),
    });
    if (left-- > 0) response.write(rest.subarray(0, after), () => setTimeout(() => response.destroy(), 20));
    else response.end(rest);
    return true;
  };
};

test("a connection that ends half-way is taken up again", async () => {
  await served(breaking(2), async (url, requests) => {
    const told = [],
      bundle = await openBundle(url, { onProgress: ({ loaded }) => told.push(loaded) });
    assert.deepEqual(Buffer.from(await bundle.file(WEIGHTS)), read(WEIGHTS));
    assert.deepEqual(
      requests.filter(({ path }) => path === WEIGHTS).map(({ range }) => range),
      [undefined, "bytes=10000-", "bytes=20000-"],
    );
    assert.deepEqual(
      told,
      told.toSorted((a, b) => a - b),
    );
    assert.equal(told.at(-1), SIZE);
  });
  await served(breaking(1, { ranges: false }), async (url) => {
    assert.deepEqual(Buffer.from(await (await openBundle(url)).file(WEIGHTS)), read(WEIGHTS));
  });
});

test("a server that always stops half-way is told as that", async () => {
  await served(breaking(99, { after: 5000 }), async (url) => {
    await assert.rejects(
      (await openBundle(url)).file(WEIGHTS),
      oneLine(
        /^onnx\/unet\/weights.bin ended after 15000 of 31552 bytes, and could not be resumed \(.*\); check the connection/,
      ),
    );
  });
  await served(
    (path, request, response) => {
      if (path !== WEIGHTS || !request.headers.range) return breaking(1)(path, request, response);
      return !!response.writeHead(206, { "content-range": `bytes 0-${SIZE - 1}/${SIZE}` }).end(read(WEIGHTS));
    },
    async (url) => {
      await assert.rejects(
        (await openBundle(url)).file(WEIGHTS),
        oneLine(/cannot be resumed: the server sent "bytes 0-/),
      );
    },
  );
  await served(
    (path, _, response) => {
      if (path !== "manifest.json") return false;
      response.writeHead(200, { "content-length": 9999 }).write("{", () => setTimeout(() => response.destroy(), 20));
      return true;
    },
    async (url) => {
      await assert.rejects(openBundle(url), oneLine(/^manifest.json ended after 1 bytes/));
    },
  );
});

test("aborting ends a download with the caller's reason", async () => {
  await served(
    (path) => path === WEIGHTS,
    async (url) => {
      const controller = new AbortController(),
        bundle = await openBundle(url, { signal: controller.signal });
      setTimeout(() => controller.abort(new Error("enough")), 30);
      await assert.rejects(bundle.file(WEIGHTS), /^Error: enough/);
    },
  );
  // While it is taken up again, too.
  const begins = breaking(1);
  await served(
    (path, request, response) => (request.headers.range ? true : begins(path, request, response)),
    async (url) => {
      const controller = new AbortController(),
        bundle = await openBundle(url, { signal: controller.signal });
      setTimeout(() => controller.abort(new Error("enough")), 200);
      await assert.rejects(bundle.file(WEIGHTS), /^Error: enough/);
    },
  );
});

/** The Cache API's part that a store uses. */
class FakeCache {
  kept = new Map();
  async match(key) {
    return this.kept.has(key) ? new Response(this.kept.get(key)) : undefined;
  }
  async put(key, response) {
    this.kept.set(key, new Uint8Array(await response.arrayBuffer()));
  }
  async delete(key) {
    return this.kept.delete(key);
  }
}

test("a store is asked first, and what it gives is checked", async () => {
  const cache = new FakeCache(),
    store = new CacheStore(cache),
    weights = ({ path }) => path === WEIGHTS;
  await served(undefined, async (url, requests) => {
    const open = async () => Buffer.from(await (await openBundle(url, { store })).file(WEIGHTS));
    assert.deepEqual(await open(), read(WEIGHTS));
    assert.deepEqual(await open(), read(WEIGHTS));
    assert.equal(requests.filter(weights).length, 1);
    const [key] = cache.kept.keys();
    for (const damage of [(bytes) => (bytes[0] ^= 1), () => cache.kept.set(key, new Uint8Array(3))]) {
      damage(cache.kept.get(key));
      const before = requests.filter(weights).length;
      assert.deepEqual(await open(), read(WEIGHTS));
      assert.equal(requests.filter(weights).length, before + 1);
      assert.deepEqual(Buffer.from(cache.kept.get(key)), read(WEIGHTS), "the store has the good file again");
    }
  });
});

test("files larger than a slice are kept whole", async () => {
  const cache = new FakeCache(),
    store = new CacheStore(cache),
    bytes = Uint8Array.from({ length: 2 ** 20 * 2 + 5 }, (_, i) => i * 31);
  await store.put("x", bytes);
  assert.deepEqual(await store.get("x"), bytes);
  assert.equal(await store.get("y"), null);
});

test("a store that is full costs the next visit alone, and says so", async () => {
  const store = {
    get: async () => null,
    delete: async () => {},
    put: async () => {
      throw new DOMException("no room", "QuotaExceededError");
    },
  };
  await served(undefined, async (url) => {
    const bundle = await openBundle(url, { store });
    for (let k = 0; k < 2; k++) assert.equal((await bundle.file(WEIGHTS)).length, SIZE);
    assert.deepEqual(bundle.warnings, [`${WEIGHTS} is not kept for the next visit: no room`]);
  });
});
