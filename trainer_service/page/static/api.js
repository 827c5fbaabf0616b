// Requests to the trainer.

export class ApiError extends Error {
    constructor(status, reason, message) {
        super(message);
        this.status = status;
        this.reason = reason;
    }
}

/** The answer to a request, unread. Requests that change something are POSTs, with the header that proves they are ours. */
export async function request(path, body) {
    const settings = { credentials: "same-origin", cache: "no-store" };
    if (body !== undefined) {
        Object.assign(settings, { method: "POST", body: JSON.stringify(body) });
        settings.headers = { "content-type": "application/json", "x-gradwire-page": "1" };
    }
    let response;
    try {
        response = await fetch(path, settings);
    } catch {
        throw new ApiError(0, "UNREACHABLE", "The trainer cannot be reached.");
    }
    if (!response.ok) {
        const found = await response.json().catch(() => ({}));
        throw new ApiError(
            response.status,
            found.error?.reason ?? "",
            found.error?.message ?? `HTTP ${response.status}`,
        );
    }
    return response;
}

/** The same, parsed as JSON. */
export async function call(path, body) {
    return (await request(path, body)).json();
}
