// What this page asks of Tiled's ordinary API, and with whose credentials.

const KEY = "dsnet_live_api_key";
const UI_TOKEN = "tiled_access_token"; // where Tiled's own page keeps the token of who has signed in there
const SCHEMA_TIMEOUT = 10_000;

export class Refused extends Error {
  constructor(message, held) {
    super(message);
    this.held = held;
  }
}
export class Missing extends Error {}
export class Away extends Error {}

/** Root of the server, whatever proxy it is behind. */
export const root = location.pathname.replace(/\/(custom|api\/v1)\/live\/?$/, "");

/** Take a key out of the address into this tab's storage, so that it is neither bookmarked nor sent along with links. */
export function takeKeyFromAddress() {
  const query = new URLSearchParams(location.search);
  const fragment = new URLSearchParams(location.hash.slice(1));
  const key = fragment.get("api_key") ?? query.get("api_key");
  if (key === null) return;
  setKey(key);
  query.delete("api_key");
  fragment.delete("api_key");
  const rest = [query.size ? `?${query}` : "", fragment.size ? `#${fragment}` : ""].join("");
  history.replaceState(null, "", location.pathname + rest);
}

export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

/** Forget the key that was refused, unless another was given meanwhile. */
export function forgetKey(refused) {
  if (credentials()?.header === refused?.header) sessionStorage.removeItem(KEY);
}

/** The viewer's credentials: the key of this tab, else the token of Tiled's page; a cookie goes along by itself. */
function credentials() {
  const key = sessionStorage.getItem(KEY);
  if (key) return { header: `Apikey ${key}`, message: { type: "auth", api_key: key } };
  const token = localStorage.getItem(UI_TOKEN);
  if (token) return { header: `Bearer ${token}`, message: { type: "auth", access_token: token } };
  return null;
}

/** GET from the API; throws Refused, Missing or Away. */
export async function get(path, parameters = {}) {
  const held = credentials();
  const query = new URLSearchParams(parameters);
  let response;
  try {
    response = await fetch(`${root}/api/v1/${path}?${query}`, {
      headers: { Accept: "application/json", ...(held && { Authorization: held.header }) },
      cache: "no-store",
      signal: AbortSignal.timeout(20_000),
    });
    if (response.ok) return await response.json();
  } catch (error) {
    throw new Away(String(error));
  }
  if (response.status === 401 || response.status === 403) throw new Refused(`status ${response.status}`, held);
  if (response.status === 404) throw new Missing(path);
  throw new Away(`status ${response.status}`);
}

/** The nodes below a path, newest first, each {id, metadata}. */
export async function newest(path, limit, selected) {
  const select = `{${Object.entries(selected).map(([name, where]) => `${name}:${where}`).join(",")}}`;
  const answer = await get(`search/${path}`, {
    "page[limit]": limit, sort: "-", fields: "metadata", select_metadata: select,
  });
  return answer.data.map((node) => ({ id: node.id, ...(node.attributes.metadata.selected ?? node.attributes.metadata) }));
}

/**
 * Call back at every update below a path, for ever: connects again when the connection is lost.
 * An update is a hint to look; what it says is not used.
 */
export class Stream {
  constructor(path, onUpdate, onState) {
    this.path = path;
    this.onUpdate = onUpdate;
    this.onState = onState;
    this.live = false;
    this.pause = 1000;
    this.connect();
  }

  connect() {
    const held = credentials();
    const url = new URL(`${root}/api/v1/stream/single/${this.path}?envelope_format=json`, location.href);
    url.protocol = url.protocol.replace("http", "ws");
    const socket = new WebSocket(url);
    // Without credentials that a script can hand over (a cookie is none), the server waits for them for ever.
    const silent = setTimeout(() => { this.pause = 60_000; socket.close(); }, SCHEMA_TIMEOUT);
    socket.onopen = () => { if (held) socket.send(JSON.stringify(held.message)); };
    socket.onmessage = () => {
      clearTimeout(silent);
      this.pause = 1000;
      this.setLive(true); // the first message is the schema
      this.onUpdate();
    };
    socket.onclose = () => {
      clearTimeout(silent);
      this.setLive(false);
      setTimeout(() => this.connect(), this.pause);
      this.pause = Math.min(2 * this.pause, 15_000);
    };
  }

  setLive(live) {
    if (live === this.live) return;
    this.live = live;
    this.onState();
  }
}
