"""Collect the files of Swagger UI."""

from __future__ import annotations

from PyInstaller.utils.hooks import collect_data_files

hiddenimports = ["swagger_ui_bundle"]
datas = collect_data_files("swagger_ui_bundle")
