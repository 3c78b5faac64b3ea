/**
 * A WebSocket in the browser that comes back when it is lost, and misses nothing.
 *
 * It hides when to try again (by the policies of wsfast/reconnect.py, down to the order in which random numbers are
 * drawn), the protocol of resume (docs/resume.md), and what waits while there is no connection.
 *
 * What it promises:
 *
 * - Every wait is random, but for those of FixedInterval. A connection that is made and drops at once backs off.
 * - With a server that speaks the protocol, messages are given exactly once and in order, both ways, over as many
 *   connections as it takes; or the state says `resumed: false`, and how many messages nobody knows the fate of.
 * - What waits is bounded, and so is what is kept to be sent again.
 * - After close() nothing happens any more: no attempt, no event but the last change of state.
 *
 * What it does not: it sends no pings, as scripts in browsers cannot, so it may take long until it notices a link that
 * died without a word. The token is in memory only: a page that is loaded anew is a new client, and so is a tab that is
 * duplicated.
 *
 * Times are seconds, and their names end in S. Names and defaults are those of the Python package, in camel case.
 *
 * @module wsfast
 */

/** The WebSocket subprotocol of resume; together with one of the application's, `wsfast.1+NAME`. */
export const PROTOCOL = "wsfast.1";

const READY = '{"wsfast": "ready"}';
const BAD_HANDSHAKE = 4400;
const NO_SIGN_OF_LIFE = 4408;
const NO_CODE = 1006;

const MOST_CHARACTERS = 4096; // of a frame of the handshake
const MOST_DOUBLINGS = 64; // the least base doubled that often is above every cap
const LEAST_S = 1e-6;
const MOST_S = 1e6;
const MOST_PROTOCOL_S = 1e9;
const MOST_TIMER_MS = 2 ** 31 - 1; // what setTimeout takes; beyond it, it does not wait at all

function check(name, value, least, most) {
  if (!(typeof value === "number" && least <= value && value <= most)) {
    throw new RangeError(`${name} must be from ${least} to ${most}, not ${value}`);
  }
}

function checkWhole(name, value, least, most) {
  check(name, value, least, most);
  if (!Number.isInteger(value)) throw new RangeError(`${name} must be a whole number, not ${value}`);
}

/** The defaults with what is given in their place. A name that is no setting is a slip, and would else go unnoticed. */
function settings(defaults, given) {
  for (const name of Object.keys(given)) {
    if (!Object.hasOwn(defaults, name)) throw new TypeError(`there is no setting ${name}`);
  }
  return { ...defaults, ...given };
}

// ---- strategies ----------------------------------------------------------------------------------------------------

/** What all strategies share. `attempt` counts those that have failed since a connection last lasted. */
class Strategy {
  static defaults = { baseS: 1, capS: 60, maxAttempts: null };

  constructor(given = {}) {
    Object.assign(this, settings(new.target.defaults, given));
    if ("intervalS" in this) check("intervalS", this.intervalS, LEAST_S, MOST_S);
    if ("baseS" in this) check("baseS", this.baseS, LEAST_S, MOST_S);
    if ("capS" in this) check("capS", this.capS, this.baseS, MOST_S);
    if ("jitter" in this) check("jitter", this.jitter, Number.MIN_VALUE, 1);
    if (this.maxAttempts !== null) checkWhole("maxAttempts", this.maxAttempts, 0, Number.MAX_SAFE_INTEGER);
    Object.freeze(this);
  }

  shouldReconnect(attempt) {
    return this.maxAttempts === null || attempt < this.maxAttempts;
  }

  backoffS(attempt) {
    return Math.min(this.capS, this.baseS * 2 ** Math.min(attempt, MOST_DOUBLINGS));
  }
}

/** `intervalS`, always, and three tries: the baseline, without jitter. */
export class FixedInterval extends Strategy {
  static defaults = { intervalS: 5, maxAttempts: 3 };

  waitS() {
    return this.intervalS;
  }
}

/** `b * (1 - jitter * random())` with `b = min(capS, baseS * 2**attempt)`. */
export class ExponentialBackoff extends Strategy {
  static defaults = { ...super.defaults, jitter: 0.2 };

  waitS(attempt, previousS, random) {
    return this.backoffS(attempt) * (1 - this.jitter * random());
  }
}

/** `random() * b`. */
export class FullJitter extends Strategy {
  waitS(attempt, previousS, random) {
    return this.backoffS(attempt) * random();
  }
}

/** `b / 2 + random() * b / 2`. */
export class EqualJitter extends Strategy {
  waitS(attempt, previousS, random) {
    const halfS = this.backoffS(attempt) / 2;
    return halfS + halfS * random();
  }
}

/** `min(capS, baseS + random() * (3 * p - baseS))`, where `p` is the previous wait and at least `baseS`. */
export class DecorrelatedJitter extends Strategy {
  waitS(attempt, previousS, random) {
    const fromS = Math.max(this.baseS, previousS);
    return Math.min(this.capS, this.baseS + random() * (3 * fromS - this.baseS));
  }
}

/** Full jitter that begins within 5 seconds, as RFC 6455, 7.2.3 has it, and ends within a minute. */
export class Default extends FullJitter {
  static defaults = { ...super.defaults, baseS: 5 };
}

/** For links that are short and good. */
export class Aggressive extends FullJitter {
  static defaults = { ...super.defaults, capS: 20 };
}

/** For links that lose much: never soon. */
export class Conservative extends EqualJitter {
  static defaults = { ...super.defaults, baseS: 5, capS: 120 };
}

// ---- close codes, and what the server tells ------------------------------------------------------------------------

/** Which close codes forbid, delay or hurry coming back, as [first, last, verdict]; all others are "normal". */
export const CLOSE_CODES = Object.freeze([
  [1000, 1000, "forbid"],
  [1002, 1003, "delay"],
  [1007, 1007, "delay"],
  [1008, 1008, "forbid"],
  [1009, 1009, "delay"],
  [1010, 1010, "forbid"],
  [1012, 1013, "delay"],
  [1015, 1015, "delay"],
  [3000, 3000, "forbid"],
  [3003, 3003, "forbid"],
  [3500, 3999, "forbid"],
  [4400, 4401, "forbid"],
  [4403, 4404, "forbid"],
  [4408, 4408, "hurry"],
  [4409, 4410, "forbid"],
  [4429, 4429, "delay"],
  [4500, 4999, "forbid"],
]);

export function verdictOf(code) {
  const row = CLOSE_CODES.find(([first, last]) => first <= code && code <= last);
  return row === undefined ? "normal" : row[2];
}

// Python's \s in ASCII; JavaScript's would take more.
const TOLD = /(?:^|;)[ \t\n\r\f\v]*(retry-after|spread)=([0-9]{1,9}(?:\.[0-9]{1,9})?)[ \t\n\r\f\v]*(?=;|$)/g;

/** What the reason of a close frame tells about coming back; null: nothing. */
export function adviceFromReason(reason) {
  const told = {};
  for (const [, name, seconds] of reason.matchAll(TOLD)) told[name] ??= Number(seconds);
  const { "retry-after": afterS = null, spread: spreadS = null } = told;
  return afterS === null && spreadS === null ? null : { afterS, withinS: 0, spreadS };
}

/** What a peer has told, bounded; null if it makes no sense. */
function toldS(seconds, mostS) {
  return typeof seconds === "number" && seconds >= 0 ? Math.min(seconds, mostS) : null;
}

// ---- the policy ----------------------------------------------------------------------------------------------------

const POLICY = {
  default: new Default(),
  conservative: new Conservative(),
  aggressive: new Aggressive(),
  conservativeLoss: 0.3,
  aggressiveLatencyS: 0.05,
  lastingS: 30,
  leastToldS: 0.5,
  mostToldS: 900,
  spreadJitter: 0.1,
  delayLeastS: 5,
  delayMostS: 30,
  hurryS: 1,
  halfLifeS: 600,
  remembered: 8,
  judgedFrom: 4,
  lowBelow: 0.3,
  highFrom: 0.9,
  lowPace: 2,
  highPace: 0.5,
};

const POLICY_RANGES = [
  [["conservativeLoss", "spreadJitter", "lowBelow", "highFrom"], 0, 1],
  [["aggressiveLatencyS", "lastingS", "leastToldS", "mostToldS", "delayLeastS", "delayMostS"], 0, MOST_S],
  [["hurryS", "halfLifeS"], LEAST_S, MOST_S],
  [["lowPace", "highPace"], 1e-3, 1e3],
];

/** How eager a client may be, from what is known of its past. */
export const Level = Object.freeze({ LOW: 0, NORMAL: 1, HIGH: 2 });

/** How a client comes back; each setting is explained at `ReconnectPolicy` in wsfast/reconnect.py. */
export class ReconnectPolicy {
  constructor(given = {}) {
    Object.assign(this, settings(POLICY, given));
    for (const [names, least, most] of POLICY_RANGES) for (const name of names) check(name, this[name], least, most);
    checkWhole("remembered", this.remembered, 0, 10_000);
    checkWhole("judgedFrom", this.judgedFrom, 1, 10_000);
    check("leastToldS", this.leastToldS, 0, this.mostToldS);
    check("delayLeastS", this.delayLeastS, 0, this.delayMostS);
    check("lowBelow", this.lowBelow, 0, this.highFrom);
    Object.freeze(this);
  }

  /** One strategy, whatever the link was like and whatever is known of the past. */
  static only(strategy) {
    const strategies = { default: strategy, conservative: strategy, aggressive: strategy };
    return new ReconnectPolicy({ ...strategies, lowPace: 1, highPace: 1 });
  }

  /** How eager a client with this past may be. */
  level(history, nowS) {
    const rate = history.successRate();
    if (rate === null || history.attempts(nowS) < this.judgedFrom) return Level.NORMAL;
    if (rate < this.lowBelow) return Level.LOW;
    return rate >= this.highFrom ? Level.HIGH : Level.NORMAL;
  }

  /** What a strategy's waits are multiplied by. */
  pace(level) {
    if (level === Level.NORMAL) return 1;
    return level === Level.LOW ? this.lowPace : this.highPace;
  }

  /** The strategy for a link: by the share of pings that were answered late, and the round-trip time; 0: not known. */
  strategy(loss, latencyS) {
    if (loss > this.conservativeLoss) return this.conservative;
    return 0 < latencyS && latencyS < this.aggressiveLatencyS ? this.aggressive : this.default;
  }
}

/** What is known of a client's attempts: bounded, and forgotten by halves. */
export class ReconnectHistory {
  #halfLifeS;
  #remembered;
  #attempts = 0;
  #successes = 0;
  #atS = 0;
  durationsS = [];
  codes = [];

  constructor(halfLifeS = POLICY.halfLifeS, remembered = POLICY.remembered) {
    this.#halfLifeS = halfLifeS;
    this.#remembered = remembered;
  }

  /** An attempt led to no connection. */
  failed(nowS) {
    this.#count(nowS, 0);
  }

  /** An attempt led to a connection, which has ended. */
  ended(nowS, lastedS, code, succeeded) {
    this.#count(nowS, succeeded ? 1 : 0);
    this.durationsS.push(lastedS);
    this.codes.push(code);
    if (this.codes.length > this.#remembered) {
      this.durationsS.shift();
      this.codes.shift();
    }
  }

  /** How many, the older ones counting less. */
  attempts(nowS) {
    return this.#attempts * this.#left(nowS);
  }

  /** Share of the attempts that led to a connection that lasted; null: there were none. */
  successRate() {
    return this.#attempts > 0 ? this.#successes / this.#attempts : null;
  }

  #count(nowS, success) {
    const left = this.#left(nowS);
    this.#attempts = this.#attempts * left + 1;
    this.#successes = this.#successes * left + success;
    this.#atS = nowS;
  }

  #left(nowS) {
    return 2 ** (-Math.max(0, nowS - this.#atS) / this.#halfLifeS);
  }
}

/**
 * Decides what comes after each connection that was lost and each attempt that failed. A decision is
 * `{waitS, attempt, because}`; with `waitS` null there is no further attempt.
 */
export class Reconnector {
  #random;
  #previousS = 0;
  #strategy;
  attempt = 0;
  level = Level.NORMAL;
  spreadS = null;

  constructor(policy, random, history = new ReconnectHistory(policy.halfLifeS, policy.remembered)) {
    this.policy = policy;
    this.history = history;
    this.#random = random;
    this.#strategy = policy.default;
  }

  /** The server has told over how many seconds its clients are to spread, should they lose it; null: forget it. */
  told(spreadS) {
    this.spreadS = toldS(spreadS, this.policy.mostToldS);
  }

  /** A connection has ended, and the client wants another one. */
  lost(nowS, lastedS, code = NO_CODE, { advice = null, loss = 0, latencyS = 0 } = {}) {
    const lasted = lastedS >= this.policy.lastingS;
    this.history.ended(nowS, lastedS, code, lasted);
    this.level = this.policy.level(this.history, nowS);
    this.#strategy = this.policy.strategy(loss, latencyS);
    if (lasted) this.attempt = this.#previousS = 0;
    return this.#decide(verdictOf(code), advice, 1);
  }

  /** An attempt led to no connection. */
  failed(nowS, { verdict = "normal", advice = null } = {}) {
    this.history.failed(nowS);
    return this.#decide(verdict, advice, this.policy.spreadJitter);
  }

  #decide(verdict, advice, spreadJitter) {
    const attempt = this.attempt;
    const spreadS = toldS(advice?.spreadS, this.policy.mostToldS);
    if (spreadS !== null) this.spreadS = spreadS;
    if (verdict === "forbid") return { waitS: null, attempt, because: "forbidden" };
    if (!this.#strategy.shouldReconnect(attempt)) return { waitS: null, attempt, because: "given up" };
    const [waitS, because] = this.#toldTo(advice) ?? this.#byItself(verdict, spreadJitter);
    this.attempt += 1;
    return { waitS, attempt, because };
  }

  #toldTo(advice) {
    const policy = this.policy;
    let afterS = toldS(advice?.afterS, policy.mostToldS);
    if (afterS === null) return null;
    if (this.attempt) afterS = Math.max(afterS, policy.leastToldS);
    return [afterS + (toldS(advice.withinS, policy.mostToldS) ?? 0) * this.#random(), "told"];
  }

  #byItself(verdict, spreadJitter) {
    const policy = this.policy;
    if (verdict === "hurry" && this.attempt === 0) return [policy.hurryS * this.#random(), "hurry"];
    let delayS = verdict === "delay" ? policy.delayLeastS : 0;
    if (this.spreadS !== null && this.attempt === 0) return [delayS + this.spreadS * this.#random(), "spread"];

    let waitS = (this.#previousS = this.#strategy.waitS(this.attempt, this.#previousS, this.#random));
    if (this.spreadS !== null) {
      const spreadS = delayS + this.spreadS * (1 + spreadJitter * this.#random());
      return [Math.max(waitS, spreadS), waitS > spreadS ? "strategy" : "spread"];
    }
    waitS *= this.policy.pace(this.level);
    if (verdict === "delay") delayS += (policy.delayMostS - policy.delayLeastS) * this.#random();
    return [Math.max(waitS, delayS), waitS >= delayS ? "strategy" : "delay"];
  }
}

// ---- messages that wait or are kept --------------------------------------------------------------------------------

const encoder = new TextEncoder();

/** A message as it can be sent again later: what it is made of may change hands meanwhile, so buffers are copied. */
function entryOf(data) {
  if (typeof data === "string") return { data, bytes: encoder.encode(data).length };
  if (ArrayBuffer.isView(data)) {
    const copy = new Uint8Array(data.buffer, data.byteOffset, data.byteLength).slice().buffer;
    return { data: copy, bytes: copy.byteLength };
  }
  if (data instanceof ArrayBuffer) return { data: data.slice(0), bytes: data.byteLength };
  throw new TypeError("a message is a string, an ArrayBuffer, or a view of one");
}

/** Messages in their order, and their number and bytes. Taking the first costs the same however many there are. */
class Messages {
  #entries = [];
  #first = 0;
  bytes = 0;

  get length() {
    return this.#entries.length - this.#first;
  }

  push(entry) {
    this.#entries.push(entry);
    this.bytes += entry.bytes;
  }

  shift() {
    const entry = this.#entries[this.#first];
    this.#entries[this.#first++] = undefined;
    if (this.#first * 2 > this.#entries.length) {
      this.#entries.splice(0, this.#first);
      this.#first = 0;
    }
    this.bytes -= entry.bytes;
    return entry;
  }

  [Symbol.iterator]() {
    return this.#entries.slice(this.#first).values();
  }
}

// ---- the protocol of resume ----------------------------------------------------------------------------------------

/** The server does not keep to the protocol of resume. */
export class BadHandshake extends Error {
  name = "BadHandshake";
}

/** What a client offers that wants one of these subprotocols: also what a server knows that does not speak ours. */
export function offers(subprotocols = []) {
  return subprotocols.length ? [...subprotocols.map((name) => `${PROTOCOL}+${name}`), ...subprotocols] : [PROTOCOL];
}

/** Whether a subprotocol that was agreed on means ours, and which one of the application's; "" is none. */
function splitSubprotocol(subprotocol) {
  if (subprotocol === PROTOCOL) return [true, ""];
  const speaks = subprotocol.startsWith(`${PROTOCOL}+`);
  return [speaks, speaks ? subprotocol.slice(PROTOCOL.length + 1) : subprotocol];
}

/** What a server's first message says. Throws BadHandshake, whatever a hostile one sends. */
export function readWelcome(message) {
  const insist = (holds, text) => {
    if (!holds) throw new BadHandshake(text);
  };
  insist(typeof message === "string", "a text message with 'welcome' must come first, not a binary one");
  insist(message.length <= MOST_CHARACTERS, `'welcome' is longer than ${MOST_CHARACTERS} characters`);
  let fields = null;
  try {
    fields = JSON.parse(message);
  } catch {
    // Not JSON is as good as null: neither is a welcome.
  }
  insist(fields?.wsfast === "welcome", '{"wsfast": "welcome"} must come first');
  const { client_id: clientId, resumed, token = null, received = 0 } = fields;
  const { grace_s: graceS = null, spread_s: spreadS = null } = fields;
  insist(typeof clientId === "string", "client_id must be a string");
  insist(typeof resumed === "boolean", "resumed must be true or false");
  insist(token === null || typeof token === "string", "token must be a string, or null");
  insist(token !== null || !resumed, "a session that is resumed must have a token");
  insist(Number.isSafeInteger(received) && received >= 0, "received must be a whole number from 0 to 2**53 - 1");
  const isTime = (value) => value === null || (typeof value === "number" && value >= 0 && value <= MOST_PROTOCOL_S);
  insist(isTime(graceS) && isTime(spreadS), "grace_s and spread_s must be numbers of seconds, or null");
  return { clientId, token, resumed, received, graceS: graceS ?? 0, spreadS };
}

/** What a client knows of its session, and what it has sent that the server may not have been given. */
export class ClientSession {
  #maxMessages;
  #maxBytes;
  #kept = new Messages();
  #confirmed = 0; // of those that were sent: how many the server is known to have been given
  #attempt = 0;
  token = null;
  received = 0;
  sent = 0;

  constructor(maxMessages = 1000, maxBytes = 2 ** 20) {
    this.#maxMessages = maxMessages;
    this.#maxBytes = maxBytes;
  }

  /** How many messages are kept. */
  get kept() {
    return this.#kept.length;
  }

  /** The first frame on a new connection, and for each a new one. */
  hello() {
    const { token, received } = this;
    const attempt = ++this.#attempt;
    return JSON.stringify(token === null ? { wsfast: "hello" } : { wsfast: "hello", token, received, attempt });
  }

  /** The server has answered. READY is to be sent next, then the entries of `resend`, then what is new. */
  welcomed({ token, resumed, received }) {
    let lost = 0;
    let unconfirmed = 0;
    if (resumed) {
      if (this.token === null || received > this.sent || received < this.#confirmed) {
        throw new BadHandshake("the server resumes what there was not");
      }
      const first = this.sent - this.kept;
      for (let number = first; number < received; number++) this.#kept.shift();
      lost = Math.max(0, first - received);
      // What was lost is not counted by the server, and never will be.
      this.sent -= lost;
      this.#confirmed = received;
    } else {
      unconfirmed = this.forget();
    }
    this.token = token;
    this.#attempt = 0;
    return { resend: [...this.#kept], lost, unconfirmed };
  }

  /** There is no session any more. Returns of how many messages nobody knows whether the server was given them. */
  forget() {
    const unconfirmed = this.sent - this.#confirmed;
    this.#kept = new Messages();
    this.received = this.sent = this.#confirmed = 0;
    this.token = null;
    return unconfirmed;
  }

  /** The application is given one more message. */
  took() {
    this.received += 1;
  }

  /** One more message is sent on the present connection. */
  sending(entry) {
    this.sent += 1;
    if (this.token === null) return;
    this.#kept.push(entry);
    while (this.kept > this.#maxMessages || this.#kept.bytes > this.#maxBytes) this.#kept.shift();
  }
}

// ---- the client ----------------------------------------------------------------------------------------------------

/** The client is closed. It has the fields of that state: `because`, `code`, `reason`. */
export class ClientClosed extends Error {
  name = "ClientClosed";

  constructor({ because, code, reason }) {
    super(`the client is closed (${because}): ${code} ${reason}`.trimEnd());
    Object.assign(this, { because, code, reason });
  }
}

/** As much waits for a connection as may. */
export class QueueFull extends Error {
  name = "QueueFull";

  constructor(messages, bytes) {
    super(`${messages} messages of ${bytes} bytes wait for the connection: no more are kept`);
    Object.assign(this, { messages, bytes });
  }
}

const OPTIONS = {
  subprotocols: [],
  policy: {},
  resume: true,
  queue: {},
  kept: {},
  connectTimeoutS: 20,
  random: Math.random,
  now: () => performance.now() / 1000,
  WebSocket: null,
};
const KEPT = { maxMessages: 1000, maxBytes: 2 ** 20 };
const QUEUE = { ...KEPT, whenFull: "drop_oldest" };

function bounds(defaults, given) {
  const made = settings(defaults, given);
  checkWhole("maxMessages", made.maxMessages, 0, Number.MAX_SAFE_INTEGER);
  checkWhole("maxBytes", made.maxBytes, 0, Number.MAX_SAFE_INTEGER);
  return made;
}

/**
 * Made by connect(). Events: "message" (a MessageEvent; `data` is a string or an ArrayBuffer) and "state" (a
 * CustomEvent, whose `detail` is the new state).
 */
export class Client extends EventTarget {
  #options;
  #policy;
  #queueBounds;
  #session;
  #reconnector;
  #url;
  #offered;
  #queue = new Messages();
  #unconfirmed = 0; // of sessions that were forgotten before the next one began
  #state;
  #ws = null; // the present one: what others still have to say is not heard
  #turn = 0; // of attempts; an address that comes when it is over is not used
  #isOpen = false;
  #welcomedS = 0;
  #timer;
  #dueS = 0;
  #mayHurry = false;
  #onlineS = -Infinity; // when the browser last said that it is, as far as it matters

  /** What is known of the link, if anything: it chooses the strategy when the connection is lost. */
  loss = 0;
  latencyS = 0;

  /** How many messages did not fit into the queue. */
  dropped = 0;

  constructor(url, options = {}) {
    super();
    this.#options = settings(OPTIONS, options);
    this.#options.WebSocket ??= globalThis.WebSocket;
    check("connectTimeoutS", this.#options.connectTimeoutS, LEAST_S, MOST_S);
    const { policy, kept, queue, random, resume, subprotocols } = this.#options;
    this.#policy = policy instanceof ReconnectPolicy ? policy : new ReconnectPolicy(policy);
    this.#reconnector = new Reconnector(this.#policy, random);
    this.#queueBounds = bounds(QUEUE, queue);
    if (!["drop_oldest", "drop_newest", "throw"].includes(this.#queueBounds.whenFull)) {
      throw new RangeError('whenFull must be "drop_oldest", "drop_newest" or "throw"');
    }
    const { maxMessages, maxBytes } = bounds(KEPT, kept);
    this.#session = new ClientSession(maxMessages, maxBytes);
    const wanted = [subprotocols].flat(); // a WebSocket takes a single name, too
    this.#offered = resume ? offers(wanted) : wanted;
    this.#url = url;
    // An address that is none is thrown to the caller, rather than tried again and again.
    if (typeof url !== "function") this.#open(url);
    this.#connect();
    globalThis.addEventListener?.("online", this.#online);
    globalThis.addEventListener?.("pageshow", this.#pageshow);
  }

  /**
   * One of
   *
   * - `{kind: "connecting", attempt}`
   * - `{kind: "connected", clientId, subprotocol, resumed, resent, lost, unconfirmed}`
   * - `{kind: "waiting", waitS, attempt, because, code, reason}`
   * - `{kind: "closed", because, code, reason, unsent}`
   */
  get state() {
    return this.#state;
  }

  /** How many messages wait for a connection. */
  get queued() {
    return this.#queue.length;
  }

  /** How many bytes of messages have not been given to the network: in the queue, and in the socket. */
  get bufferedAmount() {
    return this.#queue.bytes + (this.#ws?.bufferedAmount ?? 0);
  }

  /**
   * Send a string, an ArrayBuffer or a view of one, now or when there is a connection.
   *
   * @throws {ClientClosed} there will be no connection any more.
   * @throws {QueueFull} with the policy "throw".
   */
  send(data) {
    const entry = entryOf(data);
    if (this.#state.kind === "closed") throw new ClientClosed(this.#state);
    if (this.#state.kind === "connected" && this.#ws.readyState === 1) this.#pass(entry);
    else this.#enqueue(entry);
  }

  /** End it for good, at once. With 1000 the server forgets the session too, if it hears of it. */
  close(code = 1000, reason = "") {
    if (code !== 1000 && !(Number.isInteger(code) && 3000 <= code && code <= 4999)) {
      throw new RangeError("code must be 1000, or from 3000 to 4999");
    }
    if (encoder.encode(reason).length > 123) throw new RangeError("reason must have at most 123 bytes");
    if (this.#state.kind === "closed") return;
    this.#leave(code, reason);
    this.#end("closed", code, reason);
  }

  /** The messages from now on, until the client is closed. What comes faster than it is taken waits, without bound. */
  async *[Symbol.asyncIterator]() {
    const waiting = new Messages();
    let wake;
    const onMessage = ({ data }) => {
      waiting.push({ data, bytes: 0 });
      wake?.();
    };
    const onState = () => wake?.();
    this.addEventListener("message", onMessage);
    this.addEventListener("state", onState);
    try {
      for (;;) {
        while (waiting.length) yield waiting.shift().data;
        if (this.#state.kind === "closed") return;
        await new Promise((resolve) => (wake = resolve));
      }
    } finally {
      this.removeEventListener("message", onMessage);
      this.removeEventListener("state", onState);
    }
  }

  // ---- sending

  #pass(entry) {
    this.#session.sending(entry);
    this.#ws.send(entry.data);
  }

  #enqueue(entry) {
    const { maxMessages, maxBytes, whenFull } = this.#queueBounds;
    const isFull = () => this.#queue.length >= maxMessages || this.#queue.bytes + entry.bytes > maxBytes;
    if (isFull() && whenFull === "throw") throw new QueueFull(this.#queue.length, this.#queue.bytes);
    const fitsAlone = maxMessages > 0 && entry.bytes <= maxBytes;
    if (whenFull === "drop_oldest" && fitsAlone) {
      for (; isFull(); this.dropped++) this.#queue.shift();
    }
    if (isFull()) this.dropped++;
    else this.#queue.push(entry);
  }

  // ---- one attempt after the other

  async #connect() {
    const turn = ++this.#turn;
    this.#within(this.#options.connectTimeoutS, () => this.#timedOut("no connection in time"));
    this.#change({ kind: "connecting", attempt: this.#reconnector.attempt });
    // The first one, to a fixed address, is open already; and a listener may have closed the client.
    if (this.#ws !== null || turn !== this.#turn) return;
    try {
      const url = typeof this.#url === "function" ? await this.#url() : this.#url;
      if (turn === this.#turn) this.#open(url);
    } catch (error) {
      if (turn === this.#turn) this.#failed("normal", NO_CODE, String(error));
    }
  }

  #open(url) {
    const ws = new this.#options.WebSocket(url, this.#offered);
    ws.binaryType = "arraybuffer";
    const heard = (listener) => (event) => {
      if (ws === this.#ws) listener(event);
    };
    ws.addEventListener("open", heard(() => this.#opened(ws.protocol)));
    ws.addEventListener("message", heard(({ data }) => this.#came(data)));
    ws.addEventListener("close", heard(({ code, reason }) => this.#lost(code, reason)));
    this.#ws = ws;
  }

  #opened(protocol) {
    this.#isOpen = true;
    const [speaks, subprotocol] = this.#options.resume ? splitSubprotocol(protocol) : [false, protocol];
    if (speaks) {
      this.#within(this.#options.connectTimeoutS, () => this.#timedOut("no welcome in time"));
      this.#ws.send(this.#session.hello());
      return;
    }
    this.#unconfirmed += this.#session.forget();
    this.#connected({ clientId: null, subprotocol, resumed: null }, []);
  }

  #came(data) {
    if (this.#state.kind === "connected") {
      this.#session.took();
      this.dispatchEvent(new MessageEvent("message", { data }));
      return;
    }
    try {
      this.#welcomed(readWelcome(data));
    } catch (error) {
      if (!(error instanceof BadHandshake)) throw error;
      // What it says of our session is worth nothing. It may be another server by then, so it is tried again, in time.
      this.#unconfirmed += this.#session.forget();
      this.#leave(BAD_HANDSHAKE, error.message);
      this.#failed("delay", BAD_HANDSHAKE, error.message);
    }
  }

  #welcomed(welcome) {
    const { resend, lost, unconfirmed } = this.#session.welcomed(welcome);
    this.#unconfirmed += unconfirmed;
    this.#reconnector.told(welcome.spreadS);
    this.#ws.send(READY);
    const [, subprotocol] = splitSubprotocol(this.#ws.protocol);
    const resumed = welcome.token === null ? null : welcome.resumed;
    this.#connected({ clientId: welcome.clientId, subprotocol, resumed, lost }, resend);
  }

  #connected(what, resend) {
    clearTimeout(this.#timer);
    this.#welcomedS = this.#options.now();
    for (const { data } of resend) this.#ws.send(data);
    while (this.#queue.length) this.#pass(this.#queue.shift());
    const unconfirmed = this.#unconfirmed;
    this.#unconfirmed = 0;
    this.#change({ kind: "connected", lost: 0, ...what, resent: resend.length, unconfirmed });
  }

  // ---- losing it

  #lost(code, reason) {
    if (!this.#isOpen) {
      this.#failed("normal", code, reason);
      return;
    }
    const nowS = this.#options.now();
    const lastedS = this.#state.kind === "connected" ? nowS - this.#welcomedS : 0;
    const { loss, latencyS } = this;
    const decision = this.#reconnector.lost(nowS, lastedS, code, { advice: adviceFromReason(reason), loss, latencyS });
    this.#decided(decision, verdictOf(code), code, reason);
  }

  #failed(verdict, code, reason) {
    this.#decided(this.#reconnector.failed(this.#options.now(), { verdict }), verdict, code, reason);
  }

  #timedOut(reason) {
    this.#leave(NO_SIGN_OF_LIFE, reason);
    this.#failed("normal", NO_CODE, reason);
  }

  #decided({ waitS, attempt, because }, verdict, code, reason) {
    this.#ws = null;
    this.#isOpen = false;
    this.#turn++;
    if (waitS === null) {
      this.#end(because, code, reason);
      return;
    }
    this.#mayHurry = because !== "told" && verdict !== "delay";
    this.#within(waitS, () => this.#connect());
    this.#change({ kind: "waiting", waitS, attempt, because, code, reason });
    if (this.#options.now() - this.#onlineS < this.#policy.hurryS) this.#hurry();
  }

  /** Close the present socket, and do not listen to it any more: it may take minutes to say that it is closed. */
  #leave(code, reason) {
    const ws = this.#ws;
    this.#ws = null;
    ws?.close(code, reason);
  }

  #end(because, code, reason) {
    clearTimeout(this.#timer);
    this.#turn++;
    globalThis.removeEventListener?.("online", this.#online);
    globalThis.removeEventListener?.("pageshow", this.#pageshow);
    const unsent = this.#queue.length;
    this.#queue = new Messages();
    this.#change({ kind: "closed", because, code, reason, unsent });
  }

  // ---- what the browser knows

  /**
   * The device has a network again. What was decided before need not be waited for, nor what is decided soon after: the
   * connection may be lost without anybody having noticed yet.
   */
  #online = () => {
    this.#onlineS = this.#options.now();
    this.#hurry();
  };

  /**
   * The page comes out of the back/forward cache. No connection is used after that: Chromium closes it now, with 1001,
   * which would end the session. So we do, and come back at once.
   */
  #pageshow = ({ persisted }) => {
    if (!persisted) return;
    if (this.#ws !== null) {
      this.#ws.close(NO_SIGN_OF_LIFE);
      this.#lost(NO_CODE, "the page was away");
    }
    this.#hurry();
  };

  #hurry() {
    if (this.#state.kind !== "waiting" || !this.#mayHurry) return;
    this.#onlineS = -Infinity; // once: a server that is away is away
    const waitS = this.#policy.hurryS * this.#options.random();
    if (waitS >= this.#dueS - this.#options.now()) return;
    this.#within(waitS, () => this.#connect());
    this.#change({ ...this.#state, waitS, because: "hurry" });
  }

  #within(waitS, then) {
    clearTimeout(this.#timer);
    this.#dueS = this.#options.now() + waitS;
    this.#timer = setTimeout(then, Math.min(waitS * 1000, MOST_TIMER_MS));
  }

  #change(state) {
    this.#state = Object.freeze(state);
    this.dispatchEvent(new CustomEvent("state", { detail: this.#state }));
  }
}

/**
 * A client that connects, and connects again.
 *
 * @param {string | URL | (() => string | URL | Promise<string | URL>)} url a function is asked before each attempt: for
 *     what does not last, say.
 * @param {object} [options]
 * @param {string | string[]} [options.subprotocols] of the application's, in the order of preference.
 * @param {ReconnectPolicy | object} [options.policy] or settings of one that differ from the default.
 * @param {boolean} [options.resume] false for servers that do not speak the protocol of resume: browsers give up a
 *     connection whose server chooses none of the subprotocols that are offered.
 * @param {object} [options.queue] of messages that wait for a connection: `maxMessages`, `maxBytes`, and `whenFull`,
 *     which is "drop_oldest", "drop_newest" or "throw".
 * @param {object} [options.kept] of messages that were sent and may be sent again: `maxMessages`, `maxBytes`.
 * @param {number} [options.connectTimeoutS] an attempt may take so long, and the welcome after it as well.
 * @param {() => number} [options.random] from 0 up to, but not including, 1.
 * @param {() => number} [options.now] seconds, of a clock that does not go back.
 * @param {typeof WebSocket} [options.WebSocket]
 * @returns {Client}
 */
export function connect(url, options = {}) {
  return new Client(url, options);
}
