"""Reports: one HTML file for a fine-tuning job or a comparison, and a comparison's figures and table."""

from nblora.reporting.answers import comparison_rows
from nblora.reporting.comparison_page import comparison_report
from nblora.reporting.finetune_page import finetune_report
from nblora.reporting.page import require_libraries
from nblora.reporting.static import comparison_figures

__all__ = [
    "comparison_figures",
    "comparison_report",
    "comparison_rows",
    "finetune_report",
    "require_libraries",
]
