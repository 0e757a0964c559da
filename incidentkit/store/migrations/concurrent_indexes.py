"""Build the large indexes of the incidents while other programs read and write the table.

The migrations before this one change the table in one transaction, during which other programs
wait. They leave out the indexes that may take long. The index of words follows in ``a6d40b7f21c8``,
which changes the rule of words. Databases that an earlier version of incidentkit has upgraded have
these indexes already.
"""

from __future__ import annotations

from incidentkit.store.indexes import build_index
from incidentkit.store.migrations.search_words import put_back

revision = "a61c08d5e372"
down_revision = "3e92f6b08d47"
branch_labels = None
depends_on = None

INDEXES = {
    "ix_Incident_created_at": "(created_at, incident_id)",
    "ix_Incident_incident_type": "(incident_type, created_at, incident_id)",
    "ix_Incident_source": "(source, created_at, incident_id)",
    "ix_Incident_incident_type_source": "(incident_type, source, created_at, incident_id)",
    "ix_Incident_ended_at": "(ended_at, incident_id) WHERE ended_at IS NOT NULL",
}


def upgrade() -> None:
    for name, definition in INDEXES.items():
        build_index(name, "Incident", definition)


def downgrade() -> None:
    """Keep the indexes: the versions before this revision need them too, with that of the words."""
    put_back()
