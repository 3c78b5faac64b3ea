// What the tests use in a page: the module, and clients that remember what they said.
import * as wsfast from "/wsfast.js";

const { FullJitter, ReconnectPolicy } = wsfast;

/** At once, as far as jitter allows; nothing here waits for long. */
const soon = ReconnectPolicy.only(new FullJitter({ baseS: 0.01, capS: 0.1 }));
/** Not within a test. */
const late = ReconnectPolicy.only(new FullJitter({ baseS: 1e6, capS: 1e6 }));

/** A client with `states` and `messages`, all that there were, and `until`, which waits. */
function watch(url, options = {}) {
  const client = wsfast.connect(url, { policy: soon, ...options });
  client.states = [client.state];
  client.messages = [];
  client.addEventListener("state", ({ detail }) => client.states.push(detail));
  client.addEventListener("message", ({ data }) => client.messages.push(data));
  client.until = (holds) =>
    new Promise((resolve) => {
      const look = () => {
        if (!holds(client)) return;
        client.removeEventListener("state", look);
        client.removeEventListener("message", look);
        resolve(client.state);
      };
      client.addEventListener("state", look);
      client.addEventListener("message", look);
      look();
    });
  client.is = (kind) => client.until(() => client.state.kind === kind);
  client.all = (kind) => client.states.filter((state) => state.kind === kind);
  return client;
}

const range = (count, prefix) => Array.from({ length: count }, (_, number) => `${prefix}${number}`);

Object.assign(globalThis, { ...wsfast, wsfast, soon, late, watch, range });
