"""Build steps of saga_mm that pyproject.toml, which has the metadata, cannot express."""

import os
import shutil

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

MIM_SOURCES = ('configs', 'docs', 'tools', 'model-index.yml')


class BuildWithMim(build_py):
    """Adds `saga_mm/.mim`: configs, tools, model index and documentation.

    OpenMIM looks for it in the folder of the package, and finds that by the package's name. The MIM
    of OneDL takes the first folder among the sorted files of a distribution, `../../../bin` where
    there is a command. So a wheel has a second copy, without documentation, in a folder whose name
    comes before that. An editable install has relative links in the source tree instead.
    """

    mim = os.path.join('saga_mm', '.mim')
    first_mim = os.path.join('+saga_mm', '.mim')

    def run(self):
        if self.editable_mode:
            super().run()
            self._link_mim()
            return
        # An earlier build may have left files there that are no longer in the source.
        for package in ('saga_mm', 'saga_kernels', '+saga_mm'):
            shutil.rmtree(os.path.join(self.build_lib, package), ignore_errors=True)
        super().run()
        for source in self._mim_files():
            is_text = source.endswith('.md') or source.startswith('docs')
            for folder in (self.mim,) if is_text else (self.mim, self.first_mim):
                target = os.path.join(self.build_lib, folder, source)
                self.mkpath(os.path.dirname(target))
                self.copy_file(source, target)

    def get_source_files(self):
        """Return the files of a source distribution, including those of `.mim`."""
        return [*super().get_source_files(), *self._mim_files()]

    def _link_mim(self):
        os.makedirs(self.mim, exist_ok=True)
        for name in MIM_SOURCES:
            link = os.path.join(self.mim, name)
            if not os.path.lexists(link):
                os.symlink(os.path.join('..', '..', name), link)

    @staticmethod
    def _mim_files():
        files = [name for name in MIM_SOURCES if os.path.isfile(name)]
        for name in MIM_SOURCES:
            for folder, subfolders, names in os.walk(name):
                subfolders[:] = [sub for sub in subfolders if sub != '__pycache__']
                files += [os.path.join(folder, file) for file in names]
        return sorted(files)


setup(
    packages=find_packages(include=['saga_mm', 'saga_mm.*']) + find_packages('kernels'),
    package_dir={'saga_kernels': 'kernels/saga_kernels'},
    include_package_data=False,
    cmdclass={'build_py': BuildWithMim},
)
