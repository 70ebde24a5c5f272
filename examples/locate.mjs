// Where was this photo taken? `node examples/locate.mjs http://127.0.0.1:8000 photo.jpg`
//
// Asks a service (`pairvpr serve`), and asks again what another attempt may mend, until a deadline. `locate` needs
// nothing but `fetch`: it runs in Node 18 and newer, Deno, Bun and browsers (`photo` may be a File).

const AGAIN = new Set([408, 429, 502, 503, 504]);

/** The service's answer for a photo (bytes, Blob or File). Throws an Error with `code`, `status` and `requestId`. */
export async function locate(url, photo, { token, deadlineS = 30, ...conditions } = {}) {
  const address = `${url.replace(/\/+$/, "")}/v1/locate?${new URLSearchParams(conditions)}`;
  const headers = { "Content-Type": "application/octet-stream", ...(token && { Authorization: `Bearer ${token}` }) };
  const until = performance.now() + 1000 * deadlineS;
  for (let attempt = 0; ; attempt += 1) {
    let waitS = Math.random() * Math.min(5, 0.1 * 2 ** attempt);
    let refusal;
    try {
      const signal = AbortSignal.timeout(Math.max(1, Math.ceil(until - performance.now())));
      const response = await fetch(address, { method: "POST", headers, body: photo, signal });
      if (response.ok) return await response.json();
      refusal = await refusalOf(response);
      if (AGAIN.has(response.status)) waitS += Number(response.headers.get("Retry-After")) || 0;
    } catch (error) {
      refusal = Object.assign(new Error(`${url}: ${error.cause?.message ?? error.message}`), { code: "unreachable", status: 503 });
    }
    if (!mayBeMended(refusal) || performance.now() + 1000 * waitS >= until) throw refusal;
    await new Promise((done) => { setTimeout(done, 1000 * waitS); });
  }
}

// Ray Serve's proxies say 500, without the service's JSON, where a replica died with the request.
function mayBeMended({ status, code }) {
  return AGAIN.has(status) || (status === 500 && code === "no_service");
}

async function refusalOf(response) {
  const { error } = await response.json().catch(() => ({}));
  return Object.assign(new Error(error?.message ?? `HTTP status ${response.status}`), {
    code: error?.code ?? "no_service", status: response.status, requestId: error?.request_id,
  });
}

if (globalThis.process?.argv[1]?.endsWith("locate.mjs")) {
  const { readFile } = await import("node:fs/promises");
  const [url, path] = process.argv.slice(2);
  try {
    const { answer, position } = await locate(url, await readFile(path), { k: 1, token: process.env.PAIRVPR_TOKEN });
    console.log(answer === null ? "not in the map" : `${answer.path} ${position?.latitude ?? "?"} ${position?.longitude ?? "?"}`);
  } catch (error) {
    console.error(`error: ${error.message}`);
    process.exitCode = 1;
  }
}
