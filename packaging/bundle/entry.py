"""The bundled program's start: `vmr-agent`, or its fork server; first of all a clean environment.

PyInstaller's bootloader points LD_LIBRARY_PATH at the bundle and leaves marks of its own; the loader has read them
by now, and whatever is started from here must not see them: a guest's programs would load the bundle's libraries.
"""

import os
import sys

FORK_SERVER = "fork-server"
"""As guest.runner starts it where there is no interpreter to start it with."""


def clean() -> None:
    for name in [each for each in os.environ if each.startswith("_PYI") or each == "_MEIPASS2"]:
        del os.environ[name]
    for name in ("LD_LIBRARY_PATH", "LIBPATH"):
        before = os.environ.pop(f"{name}_ORIG", None)
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


clean()
if sys.argv[1:] == [FORK_SERVER]:
    from vmr_agent.guest import forkserver

    forkserver.main()
else:
    from vmr_agent.cli.start import agent

    sys.exit(agent())
