// Serves a folder on this machine, and can be told to serve it badly.
import { createReadStream, existsSync, statSync } from "node:fs";
import { createServer } from "node:http";
import { fileURLToPath } from "node:url";

/**
 * @param {URL} folder
 * @param {(path: string, request: any, response: any, file: string) => boolean | void} [handle] true where it has answered
 */
export async function serve(folder, handle = () => false) {
  const requests = [];
  const server = createServer((request, response) => {
    const path = decodeURIComponent(new URL(request.url, "http://x").pathname).slice(1),
      file = fileURLToPath(new URL(path, folder));
    requests.push({ path, range: request.headers.range });
    if (handle(path, request, response, file)) return;
    if (!existsSync(file) || !statSync(file).isFile()) return void response.writeHead(404).end("none");
    const size = statSync(file).size,
      start = Number(/^bytes=(\d+)-$/.exec(request.headers.range ?? "")?.[1] ?? 0);
    response.writeHead(start ? 206 : 200, {
      "content-length": size - start,
      ...(start ? { "content-range": `bytes ${start}-${size - 1}/${size}` } : {}),
    });
    createReadStream(file, { start }).pipe(response);
  });
  await new Promise((done) => server.listen(0, "127.0.0.1", done));
  return {
    url: `http://127.0.0.1:${server.address().port}/`,
    requests,
    close() {
      server.closeAllConnections();
      return new Promise((done) => server.close(done));
    },
  };
}
