"""What runs at the server."""

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from federated_digits.task import accuracy, load_model, plan_for, split
from nblora.federated import apply_updates
from nblora.federated.flower import NBLoraStrategy, from_arrays

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    base, test = str(config["base"]), split()[1]
    plan = plan_for(load_model(base), config)

    def evaluate(rounds: int, arrays: ArrayRecord) -> MetricRecord:
        model = apply_updates(load_model(base), plan, from_arrays(arrays))
        score = accuracy(model, test)  # of public digits
        print(f"after {rounds} rounds: accuracy {score:.4f}", flush=True)
        return MetricRecord({"accuracy": score})

    strategy = NBLoraStrategy(plan, str(config["folder"]), min_nodes=int(config["clients"]))
    strategy.start(grid, evaluate_fn=evaluate, timeout=600)
