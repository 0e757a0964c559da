"""Collect the files of Swagger UI."""

from __future__ import annotations

from PyInstaller.utils.hooks import collect_data_files

datas = collect_data_files("incidentkit.http", subdir="swagger_ui")
