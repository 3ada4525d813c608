"""`sandbox.py kill|start|cut|heal NODE`: of the sandbox that make.py made."""

import os
import sys

sys.path.insert(0, os.environ["CHECKOUT"])
from raylaunch.tools.sandbox import Sandbox

getattr(Sandbox.load(os.environ["SANDBOX"]), sys.argv[1])(sys.argv[2])
