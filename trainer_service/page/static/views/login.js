// Asks for a key, once.

import { call } from "../api.js";
import { h, setText } from "../dom.js";

export class LoginView {
    title = "Sign in";

    constructor(main, _context, entered) {
        const problem = h("p", { class: "problem", role: "alert", id: "key-problem" });
        const key = h("input", {
            type: "password",
            id: "key",
            autocomplete: "current-password",
            required: true,
            "aria-describedby": "key-problem",
        });
        const button = h("button", { type: "submit", class: "primary" }, "Open");
        const form = h(
            "form",
            { class: "card login" },
            h("h1", {}, "This trainer requires a key"),
            h(
                "p",
                {},
                "It is one of those in GRADWIRE_API_KEY or --api-key-file. It is sent once; your browser keeps a session, not the key.",
            ),
            h("label", { for: "key" }, "API key"),
            key,
            problem,
            button,
        );
        form.addEventListener("submit", async (event) => {
            event.preventDefault();
            button.disabled = true;
            setText(problem, "");
            try {
                entered(await call("/api/login", { key: key.value }));
            } catch (error) {
                setText(problem, error.message);
                key.select();
            } finally {
                button.disabled = false;
            }
        });
        main.append(form);
        key.focus();
    }
}
