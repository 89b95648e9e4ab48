//! Lenient readers: they read the members that matter from any JSON. A value of an unexpected type counts as absent and
//! does not affect the others.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::json::scan::Key;

/// An object of which some members matter.
pub(super) trait Members<'de>: Default {
    /// Takes the value of this key out of the map, whether it matters or not. If a key occurs twice, the last one
    /// counts.
    fn member<A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<(), A::Error>;
}

/// A value read from any JSON. Anything but an object is read as an object without members.
pub(super) struct Lenient<T>(pub(super) T);

impl<'de, T: Members<'de>> Deserialize<'de> for Lenient<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Any::<T>(PhantomData)).map(Lenient)
    }
}

/// Conversion of any JSON value. Types without a method of their own give the default.
pub(super) trait Reads<'de> {
    type Value: Default;

    fn number(_: f64) -> Self::Value {
        Self::Value::default()
    }

    fn whole(_: u64) -> Self::Value {
        Self::Value::default()
    }

    fn text(_: &str) -> Self::Value {
        Self::Value::default()
    }

    fn seq<A: SeqAccess<'de>>(mut seq: A) -> Result<Self::Value, A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Self::Value::default())
    }

    fn map<A: MapAccess<'de>>(mut map: A) -> Result<Self::Value, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Self::Value::default())
    }
}

pub(super) struct Any<R>(pub(super) PhantomData<R>);

impl<'de, R: Reads<'de>> Visitor<'de> for Any<R> {
    type Value = R::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("anything")
    }

    fn visit_bool<E>(self, _: bool) -> Result<Self::Value, E> {
        Ok(Self::Value::default())
    }

    fn visit_i64<E>(self, _: i64) -> Result<Self::Value, E> {
        // `serde_json` calls this for negative numbers only.
        Ok(Self::Value::default())
    }

    fn visit_u64<E>(self, number: u64) -> Result<Self::Value, E> {
        Ok(R::whole(number))
    }

    fn visit_f64<E>(self, number: f64) -> Result<Self::Value, E> {
        Ok(R::number(number))
    }

    fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
        Ok(R::text(text))
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(Self::Value::default())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Self::Value, A::Error> {
        R::seq(seq)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
        R::map(map)
    }
}

impl<'de, T: Members<'de>> Reads<'de> for T {
    type Value = T;

    fn map<A: MapAccess<'de>>(mut map: A) -> Result<T, A::Error> {
        let mut read = T::default();
        while let Some(Key(key)) = map.next_key()? {
            read.member(&key, &mut map)?;
        }
        Ok(read)
    }
}

/// The first element of a list.
pub(super) struct First<T>(pub(super) T);

impl<'de, T: Members<'de>> Deserialize<'de> for First<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AsFirst<T>(PhantomData<T>);
        impl<'de, T: Members<'de>> Reads<'de> for AsFirst<T> {
            type Value = T;

            fn seq<A: SeqAccess<'de>>(mut seq: A) -> Result<T, A::Error> {
                let first = seq.next_element::<Lenient<T>>()?.map(|Lenient(first)| first);
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(first.unwrap_or_default())
            }
        }
        deserializer.deserialize_any(Any::<AsFirst<T>>(PhantomData)).map(First)
    }
}
