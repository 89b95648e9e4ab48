//! The READMEs in both languages show the same commands, files and links, and what they show is there.

use std::path::Path;

fn text(name: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap()
}

/// The fenced blocks, without the comments that are translated.
fn blocks(text: &str) -> Vec<String> {
    let fenced = text.split("\n```").skip(1).step_by(2);
    let plain = |line: &str| line.split(" # ").next().unwrap().trim_end().to_owned();
    fenced.map(|block| block.lines().map(plain).collect::<Vec<_>>().join("\n")).collect()
}

/// Targets of links within the project, in order, without a README itself and what differs by language.
fn links(text: &str) -> Vec<String> {
    let targets = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    let own = targets
        .filter(|target| !target.starts_with("http") && !target.starts_with('#') && !target.starts_with("README"));
    let mut own: Vec<String> = own.map(str::to_owned).collect();
    own.sort();
    own.dedup();
    own
}

#[test]
fn both_languages_show_the_same_commands_and_paths() {
    let (english, chinese) = (text("README.md"), text("README.zh-CN.md"));
    let (ours, theirs) = (blocks(&english), blocks(&chinese));
    assert!(ours.len() > 8, "{ours:?}");
    for (index, (english, chinese)) in ours.iter().zip(&theirs).enumerate() {
        assert_eq!(english, chinese, "block {index}");
    }
    assert_eq!(ours.len(), theirs.len());
    // A page that is there in Chinese stands for the English one.
    let plain = |link: &String| link.replace(".zh-CN", "");
    let extra: Vec<String> =
        links(&chinese).into_iter().filter(|link| !links(&english).contains(&plain(link))).collect();
    assert_eq!(extra, Vec::<String>::new());
}

#[test]
fn what_they_show_is_there() {
    let english = text("README.md");
    let example = text("conf/apis.example.json");
    assert!(
        blocks(&english).iter().any(|block| block.trim_start_matches("json\n") == example.trim_end()),
        "the example is another"
    );
    for readme in ["README.md", "README.zh-CN.md"] {
        for link in links(&text(readme)) {
            let (file, anchor) = link.split_once('#').unwrap_or((&link, ""));
            assert!(Path::new(env!("CARGO_MANIFEST_DIR")).join(file).is_file(), "{readme}: {link}");
            if anchor.is_empty() {
                // A picture, or a whole page.
                continue;
            }
            let page = text(file);
            let heading = |line: &str| {
                let words = line.trim_start_matches('#').trim().to_lowercase();
                words.chars().filter(|c| c.is_alphanumeric() || " -".contains(*c)).collect::<String>().replace(' ', "-")
            };
            let found = page.lines().filter(|line| line.starts_with('#')).any(|line| heading(line) == anchor);
            assert!(found, "{readme}: {link}");
        }
    }
}
