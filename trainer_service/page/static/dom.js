// Elements from plain values. All text is inserted as text: nothing on the page parses HTML.

/** An element. `on…` properties are listeners, others are attributes; null and false are omitted. */
export function h(tag, properties = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
        if (value === null || value === undefined || value === false) continue;
        if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
        else if (name === "value" || name === "checked") made[name] = value;
        else made.setAttribute(name, value === true ? "" : String(value));
    }
    made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
    return made;
}

/** Sets an element's text if it differs: text that stays keeps a reader's selection. */
export function setText(element, text) {
    const shown = String(text);
    if (element.textContent !== shown) element.textContent = shown;
}

/** Updates an element's children to match a list, by key, and keeps the elements that stay. */
export function reconcile(parent, items, key, make, update) {
    const known = parent.known ?? (parent.known = new Map());
    const kept = new Set();
    let before = parent.firstChild;
    for (const item of items) {
        const id = key(item);
        kept.add(id);
        let element = known.get(id);
        if (!element) {
            element = make(item);
            known.set(id, element);
        }
        update(element, item);
        if (element === before) before = before.nextSibling;
        else parent.insertBefore(element, before);
    }
    for (const [id, element] of known) {
        if (!kept.has(id)) {
            element.remove();
            known.delete(id);
        }
    }
}

/** Shown where there is nothing yet: what is missing, and what to do next. */
export function empty(title, ...next) {
    return h(
        "div",
        { class: "empty" },
        h("p", { class: "empty-title" }, title),
        ...next.map((each) => h("p", {}, each)),
    );
}

/** A command to copy. */
export function command(text) {
    const button = h("button", { type: "button", class: "small", "aria-label": `Copy ${text}` }, "Copy");
    button.addEventListener("click", async () => {
        try {
            await navigator.clipboard.writeText(text);
            button.textContent = "Copied";
        } catch {
            // Without a clipboard, as over plain HTTP, the text is selected instead.
            getSelection().selectAllChildren(button.previousSibling);
            button.textContent = "Selected";
        }
        setTimeout(() => (button.textContent = "Copy"), 2000);
    });
    return h("span", { class: "command" }, h("code", {}, text), button);
}

/** Asks before something that cannot be undone. Resolves to whether to do it. */
export function ask(title, text, action) {
    return new Promise((resolve) => {
        const answer = (value) => () => {
            dialog.close(value);
        };
        const cancel = h("button", { type: "button", onclick: answer("") }, "Cancel");
        const dialog = h(
            "dialog",
            { "aria-labelledby": "ask-title", "aria-describedby": "ask-text" },
            h("h2", { id: "ask-title" }, title),
            h("p", { id: "ask-text" }, text),
            h(
                "div",
                { class: "row end" },
                cancel,
                h("button", { type: "button", class: "danger", onclick: answer("yes") }, action),
            ),
        );
        dialog.addEventListener("close", () => {
            dialog.remove();
            resolve(dialog.returnValue === "yes");
        });
        document.body.append(dialog);
        dialog.showModal();
        cancel.focus();
    });
}
