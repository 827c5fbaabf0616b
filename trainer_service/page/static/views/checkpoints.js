// What runs saved.

import { call } from "../api.js";
import { ask, command, empty, h, setText } from "../dom.js";
import * as format from "../format.js";

const LIFETIMES = [
    ["", "Keep until…"],
    ["forever", "for ever"],
    ["3600", "1 hour from now"],
    ["86400", "1 day from now"],
    ["604800", "1 week from now"],
    ["2592000", "30 days from now"],
];

export class CheckpointsView {
    title = "Checkpoints";

    constructor(main, { live, me }) {
        this.live = live;
        this.admin = me.admin && me.key_required;
        this.problem = h("p", { class: "problem", role: "alert" });
        this.list = h("ul", { class: "list" });
        this.none = h("div");
        this.summary = h("p", { class: "muted", role: "status" }, "Loading…");
        const again = h("button", { type: "button", onclick: () => this.#load() }, "Refresh");
        main.append(
            h("div", { class: "row" }, h("h1", {}, "Checkpoints"), h("span", { class: "spring" }), again),
            this.problem,
            this.summary,
            this.list,
            this.none,
        );
        this.#load();
    }

    async #load() {
        try {
            const { checkpoints } = await call("/api/checkpoints");
            setText(this.problem, "");
            const bytes = checkpoints.reduce((sum, each) => sum + each.size_bytes, 0);
            setText(this.summary, checkpoints.length ? `${checkpoints.length} saved, ${format.size(bytes)}` : "");
            this.list.replaceChildren(...checkpoints.map((each) => this.#item(each)));
            this.none.replaceChildren(
                ...(checkpoints.length
                    ? []
                    : [
                          empty(
                              "Nothing is saved yet.",
                              "Save a state to resume training from, or weights to sample from:",
                              h(
                                  "pre",
                                  {},
                                  'client.save_state("halfway").result()\nclient.save_weights_for_sampler("final").result()',
                              ),
                          ),
                      ]),
            );
        } catch (error) {
            setText(this.summary, "");
            setText(this.problem, error.message);
        }
    }

    #item(found) {
        const what = found.kind === "state" ? "state" : found.delta ? "sampler weights, delta" : "sampler weights";
        const expires = h("span", {}, expiry(found));
        const lifetime = h(
            "select",
            { "aria-label": `How long ${found.path} is kept` },
            LIFETIMES.map(([value, text]) => h("option", { value }, text)),
        );
        lifetime.addEventListener("change", async () => {
            const value = lifetime.value;
            lifetime.value = "";
            if (value)
                await this.#try(async () =>
                    setText(
                        expires,
                        expiry(
                            await call("/api/checkpoints/ttl", {
                                path: found.path,
                                ttl_seconds: value === "forever" ? null : Number(value),
                            }),
                        ),
                    ),
                );
        });
        const remove = h(
            "button",
            { type: "button", class: "danger", "aria-label": `Delete ${found.path}` },
            "Delete…",
        );
        remove.addEventListener("click", async () => {
            const text = `${found.path} (${format.size(found.size_bytes)}) will be deleted permanently. This cannot be undone.`;
            if (await ask("Delete this checkpoint?", text, "Delete permanently")) {
                await this.#try(async () => {
                    await call("/api/checkpoints/delete", { path: found.path });
                    await this.#load();
                });
                document.getElementById("main").focus();
            } else remove.focus();
        });
        const facts = [
            what,
            ...(found.step === null ? [] : [`step ${format.number(found.step)}`]),
            format.size(found.size_bytes),
            `saved ${format.ago(found.created_s)}`,
            ...(this.admin ? [`owner ${found.owner || "–"}`] : []),
        ];
        return h(
            "li",
            { class: "card checkpoint" },
            h(
                "div",
                { class: "row" },
                h("h2", {}, found.name),
                h(
                    "a",
                    { href: `#/run/${encodeURIComponent(found.run_id)}`, class: "sub" },
                    this.live.runs.get(found.run_id)?.name || found.run_id,
                ),
            ),
            h("p", { class: "muted" }, facts.join(" · "), " · ", expires),
            Object.keys(found.metadata).length
                ? h(
                      "p",
                      { class: "muted" },
                      Object.entries(found.metadata)
                          .map(([name, value]) => `${name}=${value}`)
                          .join(", "),
                  )
                : null,
            command(`gradwire checkpoints download ${found.path}`),
            h(
                "div",
                { class: "row end" },
                found.kind === "state"
                    ? null
                    : h("a", { class: "button", href: `#/sample/${encodeURIComponent(found.path)}` }, "Sample"),
                lifetime,
                remove,
            ),
        );
    }

    async #try(action) {
        try {
            setText(this.problem, "");
            await action();
        } catch (error) {
            setText(this.problem, error.message);
            this.problem.scrollIntoView({ block: "nearest" });
        }
    }
}

function expiry(found) {
    return found.expires_s === null ? "kept forever" : `expires ${format.date(found.expires_s)}`;
}
