"""Runs made by hand: the rows of their databases are known."""

from fedforward.server.records import Records

TOML = (
    'rule = "mono-forward"\ndata = "digits"\nmodel = "mlp"\nclients = 4\nrounds = {planned}\n\n[set.rule]\nlr = 0.25\n'
)


PARTS = [f"{part}_bytes" for part in ("parameters", "state", "optimizer", "gradients", "batch", "activations")]


def client_row(server_round, client, failed=False):
    sizes = {"samples": 30, "steps": 3, "batch": 10, "bytes_down": 1000 + client, "wire_down": 1200}
    if failed:
        return {"client": client, "status": "failed", "reason": "needs <3 MiB>", **sizes}
    measured = {"loss": 0.5, "accuracy_before": 0.4, "accuracy_after": 0.5 + client / 100, "seconds": 0.1}
    peak = 500_000 * (client + 1) + server_round
    bytes_up = 2000 + 10 * client + server_round
    more = {"peak_bytes": peak, "flops": 10**6 + client, "bytes_up": bytes_up, "wire_up": 2222, "fit": "as asked"}
    more |= dict.fromkeys(PARTS, 0) | {"parameters_bytes": 400_000, "activations_bytes": peak - 400_000}
    return {"client": client, "status": "ok", "rule": "mono-forward", **sizes, **measured, **more}


def on_device(row):
    """Put a client's row on a device: even clients on a large one, odd ones on a small one that fits every other."""
    client = row["client"]
    if client % 2 == 0:
        known = {"device": "large", "budget_bytes": 2**30, "simulated_seconds": 0.5 + client}
    elif client % 4 == 1:
        row = {key: row[key] for key in ("client", "rule", "bytes_down", "wire_down")}
        known = {"device": "<small>", "budget_bytes": 10**6, "status": "over budget", "reason": "needs 9 B, has 8 B"}
    else:
        known = {"device": "<small>", "budget_bytes": 10**6, "fit": "parts of 4", "peak_bytes": 950_000}
        known |= {"activations_bytes": 550_000, "simulated_seconds": 60.0 + client}
    return row | known | {"audited": int(client == 3)}


def make_run(
    folder,
    *,
    name=None,
    rounds=3,
    clients=4,
    failing=(),
    status="finished",
    toml=None,
    evaluated=True,
    fleet=False,
    diagnosed=False,
):
    """Write a run and return all of its client rows."""
    records = Records(folder)
    planned = max(rounds, 5)
    records.start(name or folder.name, TOML.format(planned=planned) if toml is None else toml, "0.1.0", {"torch": "2"})
    all_rows = []
    for t in range(rounds + 1):
        rows = [client_row(t, c, failed=(t, c) in failing) for c in range(clients)] if t else []
        rows = [on_device(row) if fleet else row for row in rows]
        sums = {k: sum(row.get(k) or 0 for row in rows) for k in ("bytes_up", "bytes_down", "wire_up", "wire_down")}
        sums["flops"] = sum(row.get("flops") or 0 for row in rows)
        server = {"accuracy": 0.1 + 0.2 * t, "loss": 2.0 / (t + 1)} if evaluated and t % 2 == 0 else {}
        refused = sum(row["status"] == "over budget" for row in rows)
        row = {
            "round": t,
            "clients": len(rows) - refused,
            "over_budget": refused,
            "seconds": 1.5,
            "model_sha256": f"{t:02d}" * 32,
            **sums,
            **server,
        }
        hidden = {"hoyer": 0.1 * t, "separation": 0.5 * t}
        found = [{"block": i, "angle": 90 - 20 * t * i} | (hidden if i < 2 else {}) for i in range(3)]
        records.commit_round(row, {"clients": rows, "diagnoses": found * diagnosed}, lambda file: None)
        all_rows += rows
    if status != "running":
        records.finish(status)
    records.close()
    return all_rows
