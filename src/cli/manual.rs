//! `api-together man`: the manual page.

use std::io;

use clap::{Arg, Command};
use clap_mangen::Man;
use clap_mangen::roff::{Inline, Roff, bold, italic, roman};

/// A term and what it means.
type Entry = (&'static str, &'static str);

const FILES: [Entry; 10] = [
    (
        "conf/apis.json, conf/apis.yaml, conf/apis.yml",
        "The config file, from the folder that the program is started in.",
    ),
    (
        "/etc/api-together/apis.json, apis.yaml, apis.yml",
        "The config file if there is none of those; the packaged service's.",
    ),
    (
        ".env",
        "Variables for ${NAME} in the config, in the folder that the program is started in and beside the config file.",
    ),
    (
        "data/ledger.db",
        "Every count, beside the config file; of a systemd service ledger.db in $STATE_DIRECTORY (/var/lib/api-together). \
         server.ledger names another file.",
    ),
    (
        "data/requests.db",
        "The request log, beside the ledger. server.requestLog.path names another file; `api-together log` reads it.",
    ),
    (
        "run/",
        "The runtime folder, beside the config file; of a systemd service $RUNTIME_DIRECTORY (/run/api-together). Its \
         running.json describes the running process, control.sock is asked by commands, upgrade.sock hands sockets over, \
         api-together.pid is written with --daemon.",
    ),
    ("conf/pingora.yaml", "Pingora's server conf: grace_period_seconds, error_log, pid_file and others."),
    ("/usr/share/doc/api-together/", "All keys of the config, operations, the JSON Schema, a Grafana dashboard."),
    ("server.tls.certFile, server.tls.keyFile", "The listener's certificate and key, read again when they change."),
    ("apis[].tls.caFile", "Authorities that an endpoint's certificate may be signed by, read again when it changes."),
];

const ENVIRONMENT: [Entry; 10] = [
    ("API_TOGETHER_CONFIG", "The config file, unless --config names it. Only from the environment itself."),
    ("API_TOGETHER_HOST, API_TOGETHER_PORT", "Win over server.host and server.port; --host and --port win over them."),
    ("PORT", "As API_TOGETHER_PORT, which wins over it. Both, the host and the levels may stand in .env."),
    ("LOG_LEVEL", "Level of the program's own log lines: error, warn, info (the default), debug or trace."),
    ("RUST_LOG", "Levels by module, in place of LOG_LEVEL."),
    ("NO_COLOR", "If set, the log has no colours."),
    (
        "HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY",
        "Outbound proxy of endpoints without apis[].proxy; in lower case, too.",
    ),
    ("STATE_DIRECTORY, RUNTIME_DIRECTORY", "Set by systemd: where the ledger and the runtime folder are."),
    ("NOTIFY_SOCKET", "Set by systemd: the process says there when it is ready."),
    ("SSL_CERT_FILE, SSL_CERT_DIR", "Trusted authorities in place of the system's."),
];

const SIGNALS: [Entry; 7] = [
    ("SIGHUP", "Reads the config, .env and the certificates again; `api-together reload` also says what came of it."),
    (
        "SIGTERM",
        "Graceful shutdown: accepts no more, and exits when the last open request has ended, after grace_period_seconds (600) \
         at the latest. A second one exits at once.",
    ),
    ("SIGINT", "Exits at once. All counts are written first."),
    (
        "SIGQUIT",
        "Hands the sockets to a process that waits for them, and shuts down gracefully. Use `api-together upgrade`.",
    ),
    ("SIGUSR1", "Opens the file that the log goes to anew, if it goes to one, so that it can be rotated."),
    ("SIGUSR2", "Replaces the process by a new one; sent by `api-together upgrade`."),
    ("SIGPIPE", "Ignored."),
];

const EXIT_STATUS: [Entry; 3] = [
    ("0", "It did what was asked. A process that served was stopped."),
    ("1", "It could not: the config has an error, the port is taken, no process runs, an endpoint fails its test."),
    ("2", "The command line is wrong."),
];

/// Returns the page in the language of `man`.
pub(super) fn page(command: &Command) -> io::Result<Vec<u8>> {
    let mut page = Vec::new();
    let man = Man::new(command.clone()).section("1").manual("api-together");
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    let mut rest = Roff::new();
    commands(&mut rest, command);
    for (title, entries) in
        [("FILES", &FILES[..]), ("ENVIRONMENT", &ENVIRONMENT), ("SIGNALS", &SIGNALS), ("EXIT STATUS", &EXIT_STATUS)]
    {
        rest.control("SH", [title]);
        for (term, meaning) in entries {
            entry(&mut rest, vec![bold(*term)], meaning);
        }
    }
    rest.to_writer(&mut page)?;
    Ok(page)
}

/// Each command with its own arguments; `clap_mangen` would refer to pages of their own.
fn commands(page: &mut Roff, command: &Command) {
    page.control("SH", ["COMMANDS"]);
    for command in command.get_subcommands().filter(|command| !command.is_hide_set()) {
        let about = command.get_about().map(ToString::to_string).unwrap_or_default();
        let mut head = vec![bold(command.get_name())];
        // Those of `run` stand under OPTIONS.
        let arguments =
            command.get_arguments().filter(|argument| !argument.is_hide_set() && command.get_name() != "run");
        let arguments: Vec<&Arg> = arguments.collect();
        for argument in &arguments {
            head.push(roman(" "));
            let is_flag = argument.get_long().is_some();
            head.push(italic(if is_flag { format!("[{}]", shown(argument)) } else { shown(argument) }));
        }
        entry(page, head, &about);
        for argument in arguments.iter().filter(|argument| argument.get_help().is_some()) {
            page.control("RS", []);
            let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
            entry(page, vec![italic(shown(argument))], &help);
            page.control("RE", []);
        }
    }
}

fn shown(argument: &Arg) -> String {
    let value = argument.get_value_names().and_then(|names| names.first()).map(ToString::to_string).unwrap_or_default();
    match argument.get_long() {
        Some(long) if argument.get_action().takes_values() => format!("--{long} {value}"),
        Some(long) => format!("--{long}"),
        None if argument.is_required_set() => value,
        None => format!("[{value}]"),
    }
}

fn entry(page: &mut Roff, term: Vec<Inline>, meaning: &str) {
    page.control("TP", []);
    page.text(term);
    page.text([roman(meaning)]);
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::cli::Cli;

    #[test]
    fn the_page_has_every_command_and_its_sections() {
        let mut command = Cli::command();
        command.build();
        let page = String::from_utf8(page(&command).unwrap()).unwrap();
        for name in command.get_subcommands().filter(|command| !command.is_hide_set()).map(Command::get_name) {
            assert!(page.contains(&format!("\n\\fB{name}\\fR")), "{name}\n{page}");
        }
        for section in ["OPTIONS", "COMMANDS", "FILES", "ENVIRONMENT", "SIGNALS", "\"EXIT STATUS\""] {
            assert!(page.contains(&format!(".SH {section}\n")), "{section}\n{page}");
        }
        assert!(!page.contains("start\\-successor"), "{page}");
    }
}
