"""The command line: `attn-plugins`. Every command is a thin call of something that Python can call as well."""

from attn_plugins.pipelines import cli_compare, cli_look, cli_mip, cli_moa, cli_simulate, cli_upcycle
from attn_plugins.pipelines.cli_app import app

# The order of the commands in --help.
for module in (cli_look, cli_simulate, cli_compare, cli_moa, cli_mip, cli_upcycle):
    module.register(app)

__all__ = ["app"]

if __name__ == "__main__":
    app()
