"""What runs inside. Both texts are read by the interpreter of the sandbox, never imported.

They share an interpreter with the solution, so nothing they say is trusted: the parent compares values that it never
sent. Each takes its code from a file descriptor (an argument has a length limit, and no null bytes) and first says
``ready`` on a private pipe: what fails before is the sandbox's fault, what fails after is the solution's.
"""

CALLS = r"""
import json as _json, os as _os, sys as _sys
_in = _os.fdopen(_os.dup(0), "rb")
_out = int(_sys.argv[2])
_null = _os.open("/dev/null", _os.O_RDONLY)
_os.dup2(_null, 0)
_dumps, _loads, _write = _json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode, _json.loads, _os.write
with _os.fdopen(int(_sys.argv[1]), "rb") as _file:
    _code = _loads(_file.read())
_scope = {"__name__": "solution", "__builtins__": __builtins__}
def _say(tag, kind, value):
    try:
        line = _dumps(value)
    except BaseException as error:
        kind, line = "raised", _dumps("the value is not JSON: " + type(error).__name__)
    data = (tag + " " + kind + " " + line).encode("ascii") + b"\n"
    while data:
        data = data[_write(_out, data):]
def _short(error):
    try:
        return (type(error).__name__ + ": " + str(error))[:300]
    except BaseException:
        return "an exception that cannot be shown"
_write(_out, b"ready\n")
_tag = _loads(_in.readline())["tag"]
try:
    exec(compile(_code, "solution.py", "exec"), _scope)
except BaseException as error:
    _say(_tag, "raised", _short(error))
else:
    _say(_tag, "value", None)
while True:
    _line = _in.readline()
    if not _line:
        break
    _call = _loads(_line)
    try:
        if not callable(_scope.get(_call["function"])):
            raise NameError("there is no function " + _call["function"])
        _value = _scope[_call["function"]](*_call["args"], **_call["kwargs"])
    except BaseException as error:
        _say(_call["tag"], "raised", _short(error))
    else:
        _say(_call["tag"], "value", _value)
_os._exit(0)
"""

SCRIPT = r"""
def _script():
    import os, sys
    with os.fdopen(int(sys.argv[1]), "rb") as file:
        code = file.read()
    os.write(int(sys.argv[2]), b"ready\n")
    os.close(int(sys.argv[2]))
    sys.argv[:] = ["script.py"]
    del globals()["_script"]
    return compile(code, "script.py", "exec")
exec(_script())
"""
