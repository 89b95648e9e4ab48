//! *Config*: the file with its secrets masked, checked while it is typed, applied whole or not at all, and put back.

use maud::{Markup, html};
use serde_json::Value;

use super::parts::{Call, fact, has, in_path, list, moment, nothing, text};
use super::words::Language;

/// The view as a document.
pub(super) fn document(w: Language, config: &Value, versions: &Value) -> Markup {
    let obstacle = text(config, "notEditable");
    let can_edit = obstacle.is_empty() && has(config, "text");
    html! {
        h1 { (w.t("Config")) }
        dl class="facts" {
            (fact(w.t("File"), &html! { code { (text(config, "path")) } }))
            (fact(w.t("In use since"), &moment(text(config, "loadedAt"))))
        }
        @if has(config, "error") { p class="alerts bad" { strong { (w.t("The config file is not in use:")) } " " (text(config, "error")) } }
        @if !obstacle.is_empty() { p class="alerts near" { (w.t("It cannot be changed here:")) " " (obstacle) } }
        @if has(config, "text") {
            form class="config" data-tag=(text(config, "tag")) {
                label for="config-text" { (w.t("Secrets are masked; a mask that stays keeps its secret.")) }
                textarea id="config-text" name="text" spellcheck="false" autocomplete="off" autocapitalize="off" wrap="off"
                    rows="24" readonly[!can_edit] { (text(config, "text")) }
                div id="config-check" role="status" aria-live="polite" {}
                @if can_edit { div class="actions" { button type="submit" disabled { (w.t("Apply")) } } }
            }
        }
        div class="actions" { (Call { method: "POST", path: "/v1/admin/reload".to_owned(), button: w.t("Read the file again"), confirm: None }.button()) }
        h2 { (w.t("Texts that were in use")) }
        @if list(versions, "data").is_empty() { (nothing(w.t("None is kept yet."))) }
        ul class="rows" {
            @for version in list(versions, "data") {
                @let name = text(version, "name");
                li {
                    (moment(text(version, "at"))) " "
                    button type="button" class="show" data-version=(in_path(name)) { (w.t("Show it, and what would change")) }
                    @if obstacle.is_empty() {
                        (Call {
                            method: "POST",
                            path: format!("/v1/admin/config/versions/{}/restore", in_path(name)),
                            button: w.t("Go back to it"),
                            confirm: Some(w.t("Go back to this text?").to_owned()),
                        }.button())
                    }
                }
            }
        }
    }
}
