/** Types of wsfast.js, where all of it is explained. What it exports for its tests alone is left out. */

export type Data = string | ArrayBuffer;
export type Random = () => number;
export type Url = string | URL;

export type State =
  | { readonly kind: "connecting"; readonly attempt: number }
  | {
      readonly kind: "connected";
      readonly clientId: string | null;
      readonly subprotocol: string;
      readonly resumed: boolean | null;
      readonly resent: number;
      readonly lost: number;
      readonly unconfirmed: number;
    }
  | {
      readonly kind: "waiting";
      readonly waitS: number;
      readonly attempt: number;
      readonly because: "told" | "spread" | "delay" | "hurry" | "strategy";
      readonly code: number;
      readonly reason: string;
    }
  | {
      readonly kind: "closed";
      readonly because: "closed" | "forbidden" | "given up";
      readonly code: number;
      readonly reason: string;
      readonly unsent: number;
    };

export interface Options {
  subprotocols?: string | string[];
  policy?: ReconnectPolicy | Partial<PolicySettings>;
  resume?: boolean;
  queue?: { maxMessages?: number; maxBytes?: number; whenFull?: "drop_oldest" | "drop_newest" | "throw" };
  kept?: { maxMessages?: number; maxBytes?: number };
  connectTimeoutS?: number;
  random?: Random;
  now?: () => number;
  WebSocket?: typeof WebSocket;
}

export function connect(url: Url | (() => Url | Promise<Url>), options?: Options): Client;

export interface ClientEvents {
  message: MessageEvent<Data>;
  state: CustomEvent<State>;
}

export class Client extends EventTarget implements AsyncIterable<Data> {
  constructor(url: Url | (() => Url | Promise<Url>), options?: Options);
  readonly state: State;
  readonly queued: number;
  readonly bufferedAmount: number;
  readonly dropped: number;
  loss: number;
  latencyS: number;
  send(data: string | ArrayBuffer | ArrayBufferView): void;
  close(code?: number, reason?: string): void;
  [Symbol.asyncIterator](): AsyncGenerator<Data, void, undefined>;
  addEventListener<K extends keyof ClientEvents>(type: K, listener: Listener<K>, options?: Once): void;
  addEventListener(type: string, listener: EventListenerOrEventListenerObject | null, options?: Once): void;
  removeEventListener<K extends keyof ClientEvents>(type: K, listener: Listener<K>): void;
  removeEventListener(type: string, listener: EventListenerOrEventListenerObject | null): void;
}
type Once = boolean | AddEventListenerOptions;
type Listener<K extends keyof ClientEvents> = (event: ClientEvents[K]) => void;

export class ClientClosed extends Error {
  constructor(state: State & { kind: "closed" });
  because: string;
  code: number;
  reason: string;
}
export class QueueFull extends Error {
  constructor(messages: number, bytes: number);
  messages: number;
  bytes: number;
}

export interface Strategy {
  shouldReconnect(attempt: number): boolean;
  waitS(attempt: number, previousS: number, random: Random): number;
}
type Backoff = { baseS?: number; capS?: number; maxAttempts?: number | null };
declare class Strategies<Settings> implements Strategy {
  constructor(settings?: Settings);
  readonly maxAttempts: number | null;
  shouldReconnect(attempt: number): boolean;
  waitS(attempt: number, previousS: number, random: Random): number;
}
export class FixedInterval extends Strategies<{ intervalS?: number; maxAttempts?: number | null }> {}
export class ExponentialBackoff extends Strategies<Backoff & { jitter?: number }> {}
export class FullJitter extends Strategies<Backoff> {}
export class EqualJitter extends Strategies<Backoff> {}
export class DecorrelatedJitter extends Strategies<Backoff> {}
export class Default extends FullJitter {}
export class Aggressive extends FullJitter {}
export class Conservative extends EqualJitter {}

type Numbers =
  | "conservativeLoss" | "aggressiveLatencyS" | "lastingS" | "leastToldS" | "mostToldS" | "spreadJitter" | "delayLeastS"
  | "delayMostS" | "hurryS" | "halfLifeS" | "remembered" | "judgedFrom" | "lowBelow" | "highFrom"
  | "lowPace" | "highPace";
export type PolicySettings = Record<"default" | "conservative" | "aggressive", Strategy> & Record<Numbers, number>;
export interface ReconnectPolicy extends Readonly<PolicySettings> {}
export class ReconnectPolicy {
  constructor(settings?: Partial<PolicySettings>);
  static only(strategy: Strategy): ReconnectPolicy;
}

export const PROTOCOL: string;
