"""The end of a program says nothing, whatever is still alive then."""

import subprocess
import sys

CODE = """
import builtins, sys, threading
import torch, weft

model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))
for name in ("default", "other"):
    weft.attach(model, weft.VeRA(r=4, targets=["0", "1"]), name=name)
x = torch.randn(3, 16, requires_grad=True)
y = model(x)
with torch.no_grad(), weft.use(model, ["default", None, "other"]):
    model(x)

def elsewhere():
    global kept
    kept = torch.randn(3, 16)
    with torch.no_grad():
        model(kept)

thread = threading.Thread(target=elsewhere)
thread.start()
thread.join()
builtins.kept_builtin = torch.randn(2, 16)
sys.kept = threading.main_thread().kept = torch.randn(2, 16)
with torch.no_grad():
    model(builtins.kept_builtin), model(sys.kept)
"""


def test_inputs_that_outlive_the_modules():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CODE], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
