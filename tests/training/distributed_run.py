"""One training that every process of a launch runs: `distributed_run.py OUTPUT_DIRECTORY JSON_SETTINGS`."""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from training_cases import MODELS, make_data, make_trainer, snapshot


def main(output_dir, name, examples, train, arguments):
    data = make_data(name, examples)
    trainer = make_trainer(MODELS[name](), data, output_dir, **arguments)
    if train:
        trainer.train()
    eval_loss = trainer.evaluate(data)["eval_loss"]
    rank = trainer.args.process_index
    save_file(snapshot(trainer.model), output_dir / f"weights-{rank}.safetensors")
    save_file(snapshot(trainer.range_loss), output_dir / f"learnable-{rank}.safetensors")
    result = {
        "processes": trainer.args.world_size,
        "logs": trainer.state.log_history,
        "eval_loss": eval_loss,
    }
    (output_dir / f"result-{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    settings = json.loads(sys.argv[2])
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    main(directory, **settings)
    torch.distributed.barrier()
    # Leave without the interpreter's teardown, in which gloo's threads abort the process now and then
    sys.stdout.flush()
    os._exit(0)
