// The page: which view is shown, and to whom.

import { call } from "./api.js";
import { h, setText } from "./dom.js";
import { Live } from "./live.js";
import { CheckpointsView } from "./views/checkpoints.js";
import { HealthView } from "./views/health.js";
import { LoginView } from "./views/login.js";
import { RunView } from "./views/run.js";
import { RunsView } from "./views/runs.js";
import { SampleView } from "./views/sample.js";

const PAGES = [
    ["#/", "Runs"],
    ["#/checkpoints", "Checkpoints"],
    ["#/sample", "Sample"],
    ["#/health", "Health"],
];
const VIEWS = { "": RunsView, run: RunView, checkpoints: CheckpointsView, sample: SampleView, health: HealthView };

const main = document.getElementById("main");
const live = new Live();
let me = null;
let view = null;

function context() {
    return { live, me, navigate: (hash) => (location.hash = hash) };
}

function show(View, argument) {
    view?.close?.();
    main.replaceChildren();
    view = new View(main, context(), argument);
    document.title = `${view.title} · Gradwire`;
}

function route() {
    if (!me?.known) return;
    const [, name = "", ...rest] = location.hash.split("/");
    const argument = decodeURIComponent(rest.join("/"));
    const View = VIEWS[name] ?? RunsView;
    show(View, argument);
    live.follow(view.runIds ?? []);
    for (const link of document.querySelectorAll("#nav a")) {
        const current = link.getAttribute("href") === (name === "run" || !(name in VIEWS) ? "#/" : `#/${name}`);
        if (current) link.setAttribute("aria-current", "page");
        else link.removeAttribute("aria-current");
    }
}

function lock() {
    live.stop();
    document.getElementById("nav").replaceChildren();
    document.getElementById("who").replaceChildren();
    setText(document.getElementById("link"), "");
    show(LoginView, async (found) => {
        me = found;
        await enter();
    });
}

async function enter() {
    document.getElementById("nav").replaceChildren(...PAGES.map(([href, name]) => h("a", { href }, name)));
    if (me.key_required) {
        const leave = async () => {
            await call("/api/logout", {}).catch(() => null);
            location.reload();
        };
        const name = me.admin ? `${me.name} (admin)` : me.name;
        document
            .getElementById("who")
            .replaceChildren(name, h("button", { type: "button", class: "small", onclick: leave }, "Sign out"));
    }
    route();
}

live.addEventListener("state", () => view?.onState?.());
live.addEventListener("points", (event) => view?.onPoints?.(event.detail));
live.addEventListener("operations", (event) => view?.onOperations?.(event.detail));
live.addEventListener("locked", lock);
live.addEventListener("link", (event) => {
    const link = document.getElementById("link");
    link.classList.toggle("down", !event.detail);
    setText(link, event.detail ? "Live" : "Connecting…");
});
addEventListener("hashchange", () => {
    route();
    main.focus({ preventScroll: true });
    scrollTo(0, 0);
});
document.getElementById("skip").addEventListener("click", () => main.focus());

try {
    me = await call("/api/me");
    if (me.known) await enter();
    else lock();
} catch (error) {
    main.replaceChildren(
        h(
            "div",
            { class: "empty" },
            h("p", { class: "empty-title" }, error.message),
            h("p", {}, "Reload the page once it is running."),
        ),
    );
}
