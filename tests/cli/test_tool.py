import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_tools_do_not_hide_modules_of_their_names(tmp_path):
    (tmp_path / 'probe.py').write_text(
        'import sys, test, train\nprint(test.__file__, train.__file__, sys.path[-1], sep="\\n")\n'
    )
    (tmp_path / 'train.py').touch()
    (tmp_path / 'config.py').write_text(
        "custom_imports = dict(imports=['saga_mm', 'probe'], allow_failed_imports=False)\n"
        "model = dict(type='no_such_model')\n"
    )
    done = subprocess.run(
        [sys.executable, ROOT / 'tools/get_flops.py', tmp_path / 'config.py'],
        env=os.environ | dict(PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path])),
        capture_output=True,
        text=True,
    )
    test, train, last = done.stdout.splitlines()[:3]
    assert not Path(test).is_relative_to(ROOT)
    assert train == str(tmp_path / 'train.py')
    # a module that users keep beside the tools is still found
    assert last == str(ROOT / 'tools')
