// Live updates from the trainer: one stream of events. What it sent is kept, so that after an interruption, a sleep or a
// change of page only what is new is requested.

import { call } from "./api.js";

const HIDDEN_MS = 15_000; // A page that nobody sees costs the trainer nothing and leaves its connection to others.
const RETRY_MS = [1000, 2000, 5000, 10_000];

export class Live extends EventTarget {
    constructor() {
        super();
        this.runs = new Map();
        this.health = null;
        this.curves = new Map(); // By run: { seqIds, steps, times, series: Map, every, leftOut }.
        this.operations = new Map();
        this.known = false; // Whether the trainer has sent its full state.
        this.followed = [];
        this.source = null;
        this.failures = 0;
        this.timer = 0;
        this.wanted = false;
        document.addEventListener("visibilitychange", () => this.#visibility());
    }

    /** Starts, or continues with other runs. */
    follow(runIds) {
        const same = runIds.length === this.followed.length && runIds.every((id, place) => id === this.followed[place]);
        this.wanted = true;
        if (same && this.source && this.source.readyState !== EventSource.CLOSED) return;
        this.followed = [...runIds];
        this.#open();
    }

    stop() {
        this.wanted = false;
        this.#close();
    }

    #open() {
        this.#close();
        if (!this.wanted) return;
        const after = this.followed
            .filter((id) => this.curves.get(id)?.seqIds.length)
            .map((id) => `${id}=${this.curves.get(id).seqIds.at(-1)}`);
        const query = new URLSearchParams({ runs: this.followed.join(","), after: after.join(",") });
        const source = new EventSource(`/api/events?${query}`);
        this.source = source;
        source.addEventListener("state", (event) => this.#state(JSON.parse(event.data)));
        source.addEventListener("points", (event) => this.#points(JSON.parse(event.data)));
        source.addEventListener("operations", (event) => this.#operations(JSON.parse(event.data)));
        source.addEventListener("open", () => {
            this.failures = 0;
            this.#tell("link", true);
        });
        source.addEventListener("error", () => {
            this.#tell("link", false);
            // The browser's own retry would start where this stream began; ours starts from what has arrived.
            this.#close();
            this.#again();
        });
    }

    async #again() {
        const wait = RETRY_MS[Math.min(this.failures, RETRY_MS.length - 1)];
        this.failures += 1;
        clearTimeout(this.timer);
        this.timer = setTimeout(async () => {
            try {
                const me = await call("/api/me");
                if (!me.known) {
                    this.#tell("locked");
                    return;
                }
            } catch {
                this.#again();
                return;
            }
            this.#open();
        }, wait);
    }

    #close() {
        clearTimeout(this.timer);
        this.source?.close();
        this.source = null;
    }

    #visibility() {
        clearTimeout(this.hiding);
        if (document.hidden) this.hiding = setTimeout(() => this.#close(), HIDDEN_MS);
        else if (this.wanted && !this.source) this.#open();
    }

    #state(told) {
        if (told.full) this.runs.clear();
        for (const run of told.runs) this.runs.set(run.run_id, run);
        for (const id of told.gone ?? []) this.runs.delete(id);
        if (told.health) this.health = told.health;
        this.known = true;
        this.#tell("state");
    }

    #points(told) {
        let curve = this.curves.get(told.run_id);
        if (!curve) {
            curve = { seqIds: [], steps: [], times: [], series: new Map() };
            this.curves.set(told.run_id, curve);
        }
        const last = curve.seqIds.at(-1) ?? 0;
        const from = told.seq_ids.findIndex((seqId) => seqId > last);
        if (from < 0) return;
        const before = curve.seqIds.length;
        curve.seqIds.push(...told.seq_ids.slice(from));
        curve.steps.push(...told.steps.slice(from));
        curve.times.push(...told.times_s.slice(from));
        for (const [name, values] of Object.entries(told.series)) {
            if (!curve.series.has(name)) curve.series.set(name, new Array(before).fill(null));
            curve.series.get(name).push(...values.slice(from));
        }
        for (const values of curve.series.values()) {
            while (values.length < curve.seqIds.length) values.push(null);
        }
        curve.every = Math.max(curve.every ?? 1, told.every);
        curve.leftOut = told.names_left_out;
        this.#tell("points", told.run_id);
    }

    #operations(told) {
        this.operations.set(told.run_id, told);
        this.#tell("operations", told.run_id);
    }

    #tell(name, detail) {
        this.dispatchEvent(new CustomEvent(name, { detail }));
    }
}
