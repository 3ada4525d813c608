# An extension that was built against another library.
# expect: import_error
# how: shell
cat > fused.c <<'C'
#include <Python.h>
extern int _ZN3c104cuda9SetDeviceEa(int);
static struct PyModuleDef def = {PyModuleDef_HEAD_INIT, "fused_kernels", 0, -1, 0};
PyMODINIT_FUNC PyInit_fused_kernels(void) { _ZN3c104cuda9SetDeviceEa(0); return PyModule_Create(&def); }
C
gcc -shared -fPIC $(python - <<'PY'
import sysconfig; print("-I" + sysconfig.get_paths()["include"])
PY
) -o fused_kernels.so fused.c >/dev/null 2>&1
cat > train.py <<'PY'
import torch

import fused_kernels

print(torch.__version__, fused_kernels)
PY
python train.py
