"""Runs made by hand: the rows of their databases are known."""

from fedforward.server.records import Records

TOML = (
    'rule = "mono-forward"\ndata = "digits"\nmodel = "mlp"\nclients = 4\nrounds = {planned}\n\n[set.rule]\nlr = 0.25\n'
)


def client_row(server_round, client, failed=False):
    sizes = {"samples": 30, "steps": 3, "batch": 10, "bytes_down": 1000 + client, "wire_down": 1200}
    if failed:
        return {"client": client, "status": "failed", "reason": "needs <3 MiB>", **sizes}
    measured = {"loss": 0.5, "accuracy_before": 0.4, "accuracy_after": 0.5 + client / 100, "seconds": 0.1}
    peak = 500_000 * (client + 1) + server_round
    bytes_up = 2000 + 10 * client + server_round
    more = {"peak_bytes": peak, "base_bytes": 9, "flops": 10**6 + client, "bytes_up": bytes_up, "wire_up": 2222}
    return {"client": client, "status": "ok", "rule": "mono-forward", **sizes, **measured, **more}


def make_run(folder, *, name=None, rounds=3, clients=4, failing=(), status="finished", toml=None, evaluated=True):
    """Write a run and return all of its client rows."""
    records = Records(folder)
    planned = max(rounds, 5)
    records.start(name or folder.name, TOML.format(planned=planned) if toml is None else toml, "0.1.0", {"torch": "2"})
    all_rows = []
    for t in range(rounds + 1):
        rows = [client_row(t, c, failed=(t, c) in failing) for c in range(clients)] if t else []
        sums = {k: sum(row.get(k) or 0 for row in rows) for k in ("bytes_up", "bytes_down", "wire_up", "wire_down")}
        sums["flops"] = sum(row.get("flops") or 0 for row in rows)
        server = {"accuracy": 0.1 + 0.2 * t, "loss": 2.0 / (t + 1)} if evaluated and t % 2 == 0 else {}
        row = {"round": t, "clients": len(rows), "seconds": 1.5, "model_sha256": f"{t:02d}" * 32, **sums, **server}
        records.commit_round(row, rows, [], b"")
        all_rows += rows
    if status != "running":
        records.finish(status)
    records.close()
    return all_rows
