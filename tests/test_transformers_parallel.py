"""transformers' own expert parallelism, two processes over Gloo, with our experts function."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from transformers_models import ids, tiny_model

pytest.importorskip("transformers", minversion="5.23", reason="transformers is not installed (extra [transformers])")
pytest.importorskip("accelerate", reason="transformers' parallel loading needs accelerate")

RANK = """
import os, sys, torch
from transformers import MixtralForCausalLM
from transformers.distributed import DistributedConfig
from moe_ops.integrations.transformers import enable
from transformers_models import ids
enable()
torch.set_num_threads(1)
folder, implementation = sys.argv[1:]
config = DistributedConfig(tp_size=2, ep_size=2, ep_implementation=implementation)
model = MixtralForCausalLM.from_pretrained(folder, distributed_config=config, experts_implementation="moe_ops").eval()
experts = next(module for module in model.modules() if hasattr(module, "_is_expert_parallel"))
assert experts._is_expert_parallel and experts.num_experts == 4, experts.num_experts
with torch.no_grad():
    logits = model(ids(), use_cache=False).logits
if torch.distributed.get_rank() == 0:
    torch.save(logits, folder + "/logits.pt")
torch.distributed.destroy_process_group()
os._exit(0)  # Gloo's threads may outlive the group, and abort with the interpreter
"""


@pytest.mark.parametrize("implementation", ["all_reduce", "all_to_all"])
def test_expert_parallel(implementation, tmp_path):
    """Four experts of eight on each rank: the logits of one process running eager."""
    model = tiny_model("mixtral")
    model.set_experts_implementation("eager")
    with torch.no_grad():
        eager = model(ids(), use_cache=False).logits
    model.save_pretrained(tmp_path)
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    path = [str(Path(__file__).parent), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path)), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(script), str(tmp_path), implementation]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), eager, rtol=0, atol=5e-6)
