"""Writes what accelerate makes of its config: `config_run.py DIRECTORY`."""

import json
import os
import sys
from pathlib import Path

from accelerate import FullyShardedDataParallelPlugin, PartialState

state = PartialState(cpu=True)
facts = {"processes": state.num_processes, "device": state.device.type}
if "ACCELERATE_USE_FSDP" in os.environ:
    plugin = FullyShardedDataParallelPlugin()
    facts |= {
        "version": plugin.fsdp_version,
        "wrap": plugin.auto_wrap_policy.__name__,
        "reshard_after_forward": plugin.reshard_after_forward,
        "state_dict_type": plugin.state_dict_type.name,
        "cpu_ram_efficient_loading": plugin.cpu_ram_efficient_loading,
    }
(Path(sys.argv[1]) / f"{state.process_index}.json").write_text(json.dumps(facts))
state.wait_for_everyone()
os._exit(0)
